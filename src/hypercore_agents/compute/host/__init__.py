"""What backends share that run agents on this very machine: processes, users, control groups, locks.

Standard library and the contract only: `process` and `microvm` both stand on it, and neither on the other.

- `identity`  which process a record means (never a pid alone)
- `locks`     one operation per agent at a time, across processes
- `users`     a user of its own for every agent, where that is possible
- `limits`    control groups, both versions
- `work`      blocking work in threads, finished even when cancelled
- `spawning`  programs that outlive whoever starts them
- `shims`     what the programs above every agent share; the standard library only
- `folders`   a sandbox's directory: record, exit file, log
- `admission` what no backend of this host starts
- `capacity`  what this host has and what of it is free
"""
