"""What a run will take before anything is run: arithmetic, held to real runs by tests/planning."""
