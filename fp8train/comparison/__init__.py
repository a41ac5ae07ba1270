"""Runs to compare: which there are, how they are trained side by side, their weights in each other's arithmetic."""
