"""How attention is computed, and who may attend to whom."""
