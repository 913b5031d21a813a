"""The platform's state: tables, queries by aggregate, migrations. No other package contains SQL."""
