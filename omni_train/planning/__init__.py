"""What a run will need and how long it will take, from its settings alone; no device is touched."""
