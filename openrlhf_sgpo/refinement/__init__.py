"""Refinement at inference: chains of answers, each of which revises the one before, and what else their tokens could buy."""
