"""Refinement at inference: chains of answers, each revising the one before it, and controls with the same number of tokens."""
