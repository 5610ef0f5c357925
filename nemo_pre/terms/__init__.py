"""How loss terms run on the ranks: the step's plan, taps on layers, the anchor's way, what is asked of a trainer."""
