"""Loaded first by every local worker process: Ctrl-C, which reaches all processes of a terminal, is for the one that started them."""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
