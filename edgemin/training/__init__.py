"""What all stages share: the contract of a stage, its fits, the loop that runs them, callbacks, sums of losses."""
