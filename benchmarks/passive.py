"""Imported before torch: threads of this process that wait do not spin, as the command `dp4tl` sets it for itself."""

import os

from workers import PASSIVE

for _name, _value in PASSIVE.items():
    os.environ.setdefault(_name, _value)
