"""What may come in between: Ctrl-C at any place, and an average that cannot be put back."""

from __future__ import annotations

import sys

import torch


class Interruption:
    """Ctrl-C at one event among those in some functions: at a line, or between two bytecodes of one."""

    def __init__(self, *files, functions=None, opcodes=True):
        self.files, self.functions, self.opcodes = {file.__file__ for file in files}, functions, opcodes
        self.at, self.seen = 0, 0

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if code.co_filename not in self.files or not (self.functions is None or code.co_name in self.functions):
            return None
        frame.f_trace_opcodes = self.opcodes
        return self._local

    def _local(self, frame, event, arg):
        if event == ("opcode" if self.opcodes else "line"):
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
        return self._local

    def during(self, function, at):
        """Call the function with an interruption at event number ``at``; returns whether there were so many."""
        self.at, self.seen = at, 0
        before = sys.gettrace()
        with torch.enable_grad():  # a trace, unlike Ctrl-C, also comes between the body of a with statement and its end
            sys.settrace(self)
            try:
                function()
            except KeyboardInterrupt:
                return True
            finally:
                sys.settrace(before)
        return False


class Sealed(dict):
    """Averages of which one cannot be written."""

    def __setitem__(self, key, value):
        if key == "lrus.0.nu_log":
            raise RuntimeError("sealed")
        super().__setitem__(key, value)
