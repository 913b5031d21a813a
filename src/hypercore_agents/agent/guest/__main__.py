"""Entry point of pid 1 in a microVM: `python3 -I -m hypercore_agents.agent.guest`, started by the initramfs."""

from hypercore_agents.agent.guest.init import main

if __name__ == "__main__":
    main()
