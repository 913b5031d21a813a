"""The tables of the store. Times are Unix seconds (UTC) as floats; money is whole micro-dollars for exact sums."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
_Counter = BigInteger().with_variant(Integer, "sqlite")

agents = Table(
    "agents",
    metadata,
    Column("agent_id", String(64), primary_key=True),
    Column("user_id", String(128), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("wanted", String(16), nullable=False, comment="running or stopped: what the reconciler drives toward"),
    Column("backend", String(32), nullable=False),
    Column("cores", Integer, nullable=False),
    Column("memory_mb", Integer, nullable=False),
    Column("gpu_quota_mb", Integer),
    Column("capacity", Integer, nullable=False, comment="sessions"),
    Column("timeout_seconds", Integer, nullable=False, comment="maximum time of a turn"),
    Column("options", JSON, nullable=False, comment="default SessionOptions of its sessions"),
    Column("tags", JSON, nullable=False),
    Column("address", Text, comment="http://host:port of the agent's server, once started"),
    Column("bearer_sealed", LargeBinary, comment="bearer of the manager for this agent; owner agent:ID"),
    Column("error", Text, comment="why it failed"),
    Column("attempts", Integer, nullable=False, server_default="0", comment="starts attempted"),
    Column("version", Integer, nullable=False, server_default="0", comment="rises with every change of this row"),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("running_at", Float, comment="when it was first ready"),
    Column("ended_at", Float, comment="when it became stopped or failed"),
    Column("image", String(255), comment="image of its sandbox; null: the backend's default"),
    Column("revision", Integer, nullable=False, server_default="0", comment="roll of the pool that started it"),
    Index(None, "user_id"),
    Index(None, "state"),
)

enrolments = Table(
    "enrolments",
    metadata,
    Column("secret_digest", String(64), primary_key=True),
    Column("agent_id", String(64), ForeignKey("agents.agent_id", ondelete="CASCADE"), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("configuration", JSON, comment="AgentConfiguration of the agent; null: its capacity, no tools"),
    Column("public_key", String(64), comment="key of the agent that used it"),
    Column("used_at", Float),
    Index(None, "agent_id"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", String(36), primary_key=True),
    Column("user_id", String(128), nullable=False),
    Column("kind", String(16), nullable=False, comment="pool or dedicated"),
    Column("agent_id", String(64), ForeignKey("agents.agent_id"), comment="agent that it is placed on; null: unplaced"),
    Column("generation", Integer, nullable=False, comment="rises with every placement"),
    Column("state", String(16), nullable=False, comment="SessionState: live (placed), parked (unplaced), ended"),
    Column("options", JSON, nullable=False, comment="frozen SessionOptions"),
    Column("turn", Integer, nullable=False, server_default="0", comment="number of the last turn begun"),
    Column("turn_holder", String(64), comment="manager process that runs a turn now; null: none runs"),
    Column("turn_max_tokens", Integer, comment="output tokens that the turn may produce"),
    Column("turn_temperature", Float),
    Column("created_at", Float, nullable=False),
    Column("last_used_at", Float, nullable=False),
    Column("ended_at", Float),
    Index(None, "user_id"),
    Index(None, "agent_id", "state"),
    Index(None, "state", "ended_at"),
)

waiting_turns = Table(
    "waiting_turns",
    metadata,
    Column("ticket", _Counter, primary_key=True, autoincrement=True, comment="the lowest of a session is next"),
    Column("session_id", String(36), nullable=False),
    Column("holder", String(64), nullable=False, comment="manager process in which it waits"),
    Column("joined_at", Float, nullable=False),
    Index(None, "session_id", "ticket"),
    Index(None, "joined_at"),
    sqlite_autoincrement=True,
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("owner", String(192), primary_key=True, comment="user:ID, agent:ID or platform"),
    Column("sealed", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
)

ledger = Table(
    "ledger",
    metadata,
    Column("entry_id", _Counter, primary_key=True, autoincrement=True),
    Column("created_at", Float, nullable=False),
    Column("day", String(10), nullable=False, comment="YYYY-MM-DD, UTC"),
    Column("user_id", String(128), nullable=False),
    Column("agent_id", String(64), nullable=False),
    Column("session_id", String(36), nullable=False),
    Column("turn", Integer, nullable=False),
    Column("model", String(128), nullable=False),
    Column("input_tokens", Integer, nullable=False),
    Column("output_tokens", Integer, nullable=False),
    Column("cache_read_tokens", Integer, nullable=False),
    Column("cache_creation_tokens", Integer, nullable=False),
    Column("cost_micro_usd", BigInteger, nullable=False),
    Column("outcome", String(16), nullable=False, comment="complete, or cut: estimated from its output"),
    Column("charge_id", String(36), comment="unique, so that a charge is written only once"),
    Index(None, "charge_id", unique=True),
    Index(None, "session_id", "turn"),
    Index(None, "user_id", "day"),
    Index(None, "day"),
)

installation = Table(
    "installation",
    metadata,
    Column("name", String(64), primary_key=True, comment="name of a note about the store itself"),
    Column("value", Text, nullable=False, comment="JSON"),
    Column("updated_at", Float, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("fence", Integer, nullable=False, comment="rises with every new holder"),
    Column("expires_at", Float, nullable=False),
)

pools = Table(
    "pools",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("desired", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("updated_at", Float, nullable=False),
)

rolls = Table(
    "rolls",
    metadata,
    Column("name", String(64), primary_key=True, comment="name of the pool; its row is the last roll"),
    Column("revision", Integer, nullable=False),
    Column("template", JSON, nullable=False, comment="image and config of new agents"),
    Column("before_revision", Integer, nullable=False),
    Column("before_template", JSON, nullable=False, comment="template to return to if the roll stops"),
    Column("status", String(16), nullable=False, comment="rolling, done or stopped"),
    Column("at_once", Integer, nullable=False),
    Column("reason", Text, comment="why it stopped"),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float),
)

signals = Table(
    "signals",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Float, nullable=False),
    Column("at", Float, nullable=False),
)

heartbeats = Table(
    "heartbeats",
    metadata,
    Column("agent_id", String(64), ForeignKey("agents.agent_id", ondelete="CASCADE"), primary_key=True),
    Column("at", Float, nullable=False, comment="when the gateway received it"),
    Column("ready", Boolean, nullable=False),
    Column("sessions", Integer, nullable=False),
    Column("live", Integer, nullable=False, comment="sessions with a Claude CLI process"),
    Column("running", Integer, nullable=False, comment="running turns"),
    Column("waiting", Integer, nullable=False, comment="turns waiting for a process"),
    Column("memory_mb", Integer, nullable=False),
    Column("memory_limit_mb", Integer, nullable=False),
    Column("cpu", Float, comment="share of the agent's cores in use"),
    Column("queue_wait_seconds", Float, comment="95th percentile of the last minute's turns"),
    Column("start_wait_seconds", Float, comment="95th percentile of the last minute's starts"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("user_id", String(128), primary_key=True),
    Column("route", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("body_digest", String(64), nullable=False),
    Column("holder", String(64), nullable=False, comment="manager process that runs the request"),
    Column("status", Integer, comment="HTTP status of the answer; null until there is one"),
    Column("answer", LargeBinary),
    Column("created_at", Float, nullable=False),
    Column("made", String(64), comment="agent or session that the first request created"),
    Index(None, "created_at"),
)

bearers = Table(
    "bearers",
    metadata,
    Column("digest", String(64), primary_key=True, comment="SHA-256 of the bearer"),
    Column("name", String(128), nullable=False),
    Column("scope", String(16), nullable=False, comment="admin, user or metrics"),
    Column("user_id", String(128), comment="set for scope user"),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    UniqueConstraint("name"),
)

rates = Table(
    "rates",
    metadata,
    Column("user_id", String(128), primary_key=True),
    Column("window_seconds", Integer, primary_key=True),
    Column("window", BigInteger, nullable=False, comment="number of the newest slot: time / its width"),
    Column("requests", Integer, nullable=False, comment="in all slots"),
    Column("requests_before", Integer, nullable=False, comment="always 0; used by an earlier release"),
    Column("slots", Text, nullable=True, comment="requests in each slot, newest first"),
)

transcripts = Table(
    "transcripts",
    metadata,
    Column("entry_id", _Counter, primary_key=True, autoincrement=True, comment="order within a session"),
    Column("session_id", String(36), nullable=False),
    Column("subpath", String(256), nullable=False, comment="empty: the session's own transcript; else a subagent's"),
    Column("uuid", String(64), nullable=False, comment="id of the entry; repeated entries are skipped"),
    Column("line", Text, nullable=False, comment="the entry as JSON"),
    UniqueConstraint("session_id", "uuid"),
    Index(None, "session_id", "entry_id"),
)

transcript_sizes = Table(
    "transcript_sizes",
    metadata,
    Column("session_id", String(36), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False, comment="size of its entries, with a fixed overhead for each"),
)

workspaces = Table(
    "workspaces",
    metadata,
    Column("session_id", String(36), primary_key=True),
    Column("owner", String(64), nullable=False, comment="folder of the user's blobs: a digest of the user's id"),
    Column("digest", String(64), nullable=False, comment="SHA-256 of the archive, which names its blob"),
    Column("size_bytes", BigInteger, nullable=False),
    Column("updated_at", Float, nullable=False),
    Index(None, "owner", "digest"),
)

stored_bytes = Table(
    "stored_bytes",
    metadata,
    Column("owner", String(64), primary_key=True, comment="folder of the user's blobs"),
    Column("user_id", String(128), nullable=False),
    Column("size_bytes", BigInteger, nullable=False, comment="total of the archives of the user's sessions"),
    Index(None, "size_bytes"),
)

unused_blobs = Table(
    "unused_blobs",
    metadata,
    Column("owner", String(64), primary_key=True, comment="folder of the user's blobs"),
    Column("digest", String(64), primary_key=True),
    Column("noted_at", Float, nullable=False),
    Index(None, "noted_at"),
)

events = Table(
    "events",
    metadata,
    Column("session_id", String(36), primary_key=True),
    Column("number", BigInteger, primary_key=True, comment="id of the event: generation * 2^32 + sequence"),
    Column("name", String(32), nullable=False),
    Column("data", Text, nullable=False, comment="JSON"),
    Column("position", BigInteger, nullable=False, comment="count of the session's events up to this one"),
    Column("total", BigInteger, nullable=False, comment="characters of the data of these events"),
    Column("at", Float, nullable=False),
)
