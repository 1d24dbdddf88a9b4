"""Write the page that `dvc plots show` and `dvc plots diff` fill, so that their charts draw offline.

DVC's own page loads Vega from a content network; this one carries the same libraries, taken from
the installed vl-convert-python.

Reads  nothing
Writes data/plots_page.html
Params none
"""

from __future__ import annotations

import vl_convert

from stages.lib.core.files import write_text
from stages.lib.core.paths import PLOTS_PAGE
from stages.lib.frame.params import Params
from stages.lib.frame.run import run_stage

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>Plots</title>
<script>(function () {%s})();</script>
<style>
body { font-family: system-ui, sans-serif; margin: 1.5rem; }
img { max-width: 100%%; }
</style>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def main(params: Params) -> None:
    bundle = vl_convert.javascript_bundle().replace("</script", "<\\/script")  # type: ignore[call-arg]
    write_text(PLOTS_PAGE, PAGE % bundle)


if __name__ == "__main__":
    run_stage("plots_page", (), main)
