"""What this machine can train on: the checks behind ``portmoe check-env``.

``survey`` runs every check that touches torch or a driver in a child process (``examine``), so that a
broken torch, a crash or a hang becomes a finding. The parent side never imports torch.
"""
