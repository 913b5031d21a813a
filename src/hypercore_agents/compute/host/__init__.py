"""The parts that backends of this host share: records, processes, users, locks.

`process` and `microvm` both use this package, and neither imports the other. It uses the standard library, the contract
and `kit` only.

- `identity`          identifies a process across pid reuse and reboots
- `locks`             one operation per agent at a time, across processes
- `users`             a separate user for every agent, where the host allows it
- `blocking_work`     runs blocking work in threads, to completion even if the caller is cancelled
- `spawning`          starts programs that outlive the manager
- `shims`             the code that the shims of all backends share; standard library only
- `records`           the record of a sandbox
- `sandbox_directory` the directory of a sandbox: record, exit file, log
- `observing`         the state of a sandbox, and why it ended
- `teardown`          kills and removes a sandbox
- `request_checks`    the requests that every backend of this host refuses
- `capacity`          the resources of this host, and how much of them is free
- `host_backend`      the base class of the backends
"""
