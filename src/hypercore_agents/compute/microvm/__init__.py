"""Agents in microVMs on this machine: QEMU's `microvm` machine, KVM where it really works, TCG where it does not."""
