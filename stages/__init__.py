"""The stages, each run as `python -m stages.NAME`; what they share lies in rooms in `lib`."""

import sys

if sys.argv[0] == "-m":  # as it is while `python -m stages.X` imports its package
    import _signal  # the module in C: at an interrupt now, even the import of `signal` would show a traceback

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from stages.lib.frame.ends import end_quietly
from stages.lib.frame.start_up import look_for_cycles_less_often

end_quietly()
look_for_cycles_less_often()  # before torch and diffusers are imported
