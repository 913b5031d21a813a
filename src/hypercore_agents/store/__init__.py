"""The platform's state: tables, queries by aggregate, migrations. The only place that knows SQL."""
