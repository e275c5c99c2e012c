"""What all stages share: the contract of a stage, its fits, the runner, callbacks, the sum of losses."""
