"""The stages, each run as `python -m stages.NAME`; what they share lies in rooms in `lib`."""

from stages.lib.frame.start_up import look_for_cycles_less_often

look_for_cycles_less_often()  # before torch and diffusers are imported
