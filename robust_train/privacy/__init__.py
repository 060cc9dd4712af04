"""Differential privacy: DP-SGD, its accounting, and the certificate of what was released."""
