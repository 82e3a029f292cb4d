"""How well a worker's device and node are: readings, what is wrong with them, and what a worker says of itself."""
