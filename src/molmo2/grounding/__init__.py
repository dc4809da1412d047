"""Points, tracks and counts: out of answers, into files and prompts. Needs nothing but Python."""
