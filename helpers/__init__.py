"""Thin helpers shared by the five notebooks; what teaches stands on their pages."""
