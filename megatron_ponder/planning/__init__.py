"""What a run will need, before it runs: schedule, memory, work and communication per rank."""
