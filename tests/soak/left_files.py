"""Files in a run folder that a killed process leaves for the tests; without what killer.py changes when imported."""

STATE, STEPS = "final-optimizer.pt", "steps.log"
