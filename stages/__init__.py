"""The stages, each run as `python -m stages.NAME`; what they share lies in rooms in `lib`."""

from stages.lib.frame.ends import end_quietly
from stages.lib.frame.start_up import look_for_cycles_less_often

end_quietly()
look_for_cycles_less_often()  # before torch and diffusers are imported
