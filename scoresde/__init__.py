"""scoresde"""
