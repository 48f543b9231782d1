"""From a trained network to files that a vehicle runs, with the proof that they say the same."""
