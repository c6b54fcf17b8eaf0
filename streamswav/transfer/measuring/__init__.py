"""What frozen features are worth: kNN, linear classifiers, SVMs, and results that can be compared."""
