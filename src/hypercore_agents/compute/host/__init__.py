"""What backends share that run agents on this very machine: processes, users, control groups, locks.

Standard library only, and no knowledge of what a sandbox is: `process` and `microvm` both stand on it, and neither on
the other.

- `identity`  which process a record means (never a pid alone)
- `locks`     one operation per agent at a time, across processes
- `users`     a user of its own for every agent, where that is possible
- `limits`    control groups, both versions
"""
