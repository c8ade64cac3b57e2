"""The signals that ask a command to end: Ctrl-C, what clouds and SLURM send, and what `sbatch --signal` may name."""

import signal

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
