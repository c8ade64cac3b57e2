"""The style sheet: light and dark, wide and narrow, and paper."""

from moadapt.reporting.examples import picking
from moadapt.reporting.palette import RUNS, variables

_MOST_ROWS = 2 * len(RUNS)

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main,header,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px;font-weight:650;letter-spacing:-.01em}
h2{font-size:19px;line-height:1.3;margin:0 0 8px;font-weight:650}
h3{font-size:15px;margin:22px 0 6px;font-weight:650}
h3 small{font-weight:400;font-size:13px;color:var(--muted);margin-left:6px}
section{padding:22px 0 4px;margin-top:20px;border-top:1px solid var(--rule)}
p{margin:0 0 10px;max-width:78ch}
a{color:inherit;text-decoration-color:var(--rule);text-underline-offset:3px}
a:hover{text-decoration-color:currentColor}
nav{display:flex;flex-wrap:wrap;gap:2px 18px;margin-top:10px;font-size:14px}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.88em}
pre{background:var(--raised);padding:10px 12px;border-radius:4px;white-space:pre-wrap;overflow-wrap:anywhere;
margin:0 0 12px}
dl{margin:0}
dt{font-weight:600}
dd{margin:0 0 8px;color:var(--muted);max-width:78ch}
dd code{white-space:nowrap}
summary{cursor:pointer;color:var(--muted);font-size:13px}
.aside,.nothing{color:var(--muted);font-size:13px}
p.aside{max-width:100ch}
.nothing{padding:10px 12px;background:var(--raised);border-radius:4px}
.swatch{display:inline-block;width:.72em;height:.72em;border-radius:2px;margin-right:.45em;flex:none}
.legend{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:2px 28px;font-size:14px}
.inline{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:3px 28px;font-size:13px}
.inline dt,.inline dd{display:inline;margin:0}
.inline dt{margin-right:.6em}
.key{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:13px;max-width:none}
.wide{overflow-x:auto;margin:0 0 10px}
table{border-collapse:collapse;font-size:14px;width:100%}
th{font-weight:600;text-align:left}
thead th,thead td{font-size:12.5px;color:var(--muted);font-weight:500;text-align:right;
vertical-align:bottom;padding:3px 10px}
thead th:first-child{text-align:left}
tbody th{font-weight:500;padding:6px 10px 6px 0;white-space:nowrap}
tbody td{padding:6px 10px;text-align:right;white-space:nowrap}
tbody tr{border-top:1px solid var(--rule)}
td.text,thead th.text{text-align:left}
td.wrapped{white-space:normal}
.results thead tr:first-child th{text-align:left;color:var(--ink);font-weight:600}
.results th[colspan],.results .edge{border-left:1px solid var(--rule)}
.results b::before{content:"\\2022";margin-right:.3em;font-weight:400}
.scored{background:linear-gradient(var(--bar),var(--bar)) 10px
calc(100% - 2px)/calc(var(--share)*(100% - 20px)) 2px no-repeat}
.results thead th[scope=col]:nth-child(n+8){white-space:normal}
.results thead th{white-space:nowrap}
.narrow{width:auto}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(258px,1fr));gap:12px}
.card{display:grid;grid-template-columns:100px 1fr;grid-template-rows:auto 1fr;gap:4px 10px;align-items:start;
align-content:start;background:var(--raised);border-radius:4px;padding:10px;font-size:13.5px;line-height:1.4}
.picture,.lost{grid-row:1/3}
.long .picture,.long .lost{grid-row:1}
.long .answers{grid-column:1/3}
.card>*{min-width:0;overflow-wrap:anywhere}
.tall .card{grid-template-columns:1fr;grid-template-rows:auto}
.tall .picture,.tall .lost{grid-row:auto;margin-bottom:4px}
.card p{margin:0 0 2px}
.card details p{color:var(--muted);font-size:13px}
.prompt{font-weight:600;text-wrap:balance}
q.aside{display:block;padding-left:1.2em}
.picture{display:block;width:100%;height:auto;border-radius:2px}
.pixels{image-rendering:pixelated}
.lost{background:var(--rule);color:var(--muted);font-size:12px;padding:8px;border-radius:2px}
.answers{font-size:13px;margin-top:2px}
.answers td{padding:2px 0;text-align:left;white-space:normal;vertical-align:top}
.answers .mark{width:1.4em}
.answers .mark+td{min-width:4.5em}
.answers .who{text-align:right;white-space:nowrap;padding-left:8px}
.right{color:var(--right);font-weight:700}
.wrong{color:var(--wrong);font-weight:700}
.who .swatch{margin:0 0 0 3px}
.picture rect{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:miter}
.halo{stroke:#000;stroke-width:4.4px;stroke-opacity:.55}
.line{stroke:#fff;stroke-width:2.4px}
.line.reference{stroke-dasharray:5 4}
.prediction{display:none}
.ask{font-size:13px;color:var(--muted);margin-right:6px}
.pick{position:absolute;opacity:0}
.pick+label{display:inline-block;font-size:13px;padding:1px 9px;
margin:0 4px 8px 0;border:1px solid var(--rule);border-radius:4px;cursor:pointer}
.pick:checked+label{border-color:var(--ink)}
.pick:focus-visible+label{outline:2px solid var(--accent);outline-offset:1px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:18px 22px;margin:12px 0}
figure{margin:0;min-width:0;max-width:400px}
figcaption{font-size:14px;font-weight:600;margin-bottom:4px}
.chart{display:block;width:100%;height:auto;overflow:visible}
.chart *{stroke-linejoin:round;stroke-linecap:butt}
.measured thead th:first-child{padding-left:0}
.stored{position:absolute}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(142px,1fr));gap:8px;align-items:start}
.routed{background:var(--raised);border-radius:4px;padding:8px;min-width:0}
.broad{grid-column:2/-1;max-width:620px}
.place{font-size:13px;color:var(--muted);margin:0 0 4px;overflow-wrap:anywhere}
.patched{display:block;width:100%;height:auto;border-radius:2px;margin-bottom:6px}
.words{font-size:13px;line-height:1.7;white-space:pre-wrap;overflow-wrap:anywhere;margin:0}
.words span{border-radius:2px;padding:1px 0}
.strip{display:flex;flex-wrap:wrap;margin-bottom:6px}
.strip i{width:8px;height:8px}
.bars{display:grid;grid-template-columns:auto 1fr;gap:3px 8px;align-items:center;font-size:12.5px;color:var(--muted)}
.bar{display:flex;height:12px;border-radius:2px;overflow:hidden;background:var(--rule)}
.settings{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:0 28px;font-size:14px;
margin-bottom:14px}
.settings div{display:flex;justify-content:space-between;gap:12px;border-bottom:1px solid var(--rule);padding:3px 0}
.settings dt{font-weight:400;color:var(--muted)}
.settings dd{color:var(--ink);margin:0;text-align:right;overflow-wrap:anywhere}
footer{padding-bottom:36px}
"""

_NARROW = """
body{font-size:15px}
main,header,footer{padding:0 14px}
header{padding-top:18px}
.legend,.inline,.cards,.figures,.settings{grid-template-columns:minmax(0,1fr)}
.card,.tall .card{grid-template-columns:124px 1fr;grid-template-rows:auto 1fr}
.tall .picture,.tall .lost{grid-row:1/3}
tbody th{white-space:normal;min-width:108px}
.broad{grid-column:1/-1}
.results tbody th,.results thead tr>:first-child{position:sticky;left:0;background:var(--ground)}
"""

_PAPER = """
@page{margin:14mm}
body{font-size:9.5pt}
main,header,footer{max-width:none;padding:0}
nav,.pick,.pick+label:not(.pick:checked+label){display:none}
.pick+label{border:0;padding:0}
.card,.routed,figure,.wide,pre,.legend div{break-inside:avoid}
.cards,.figures{grid-template-columns:repeat(3,1fr)}
.panels{grid-template-columns:repeat(7,1fr)}
.cards.tall,.settings{grid-template-columns:repeat(4,1fr)}
.figures:has(>:nth-child(4)){grid-template-columns:repeat(2,1fr)}
.legend,.settings{font-size:8.5pt}
.legend{grid-template-columns:repeat(3,1fr)}
.inline{grid-template-columns:repeat(2,1fr);font-size:7.5pt}
figure{max-width:80mm}
.cards{gap:8px}
.card{grid-template-columns:72px 1fr;padding:6px;font-size:8pt}
.card .aside,.card details p,.card summary,.answers,.aside,.key{font-size:7.5pt}
.answers .mark{width:1.2em}
.answers .mark+td{min-width:4em}
.settings{break-before:avoid}
h2,h3,.ask{break-after:avoid}
h1{font-size:18pt}
h2{font-size:13pt}
h3{font-size:10.5pt}
section{padding:12px 0 0;margin-top:12px}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.wide{overflow:visible}
table{font-size:8.5pt}
tbody td,thead th,thead td{padding-left:4px;padding-right:4px}
tbody th{white-space:normal}
"""


def style_sheet() -> str:
    """Return the page's whole style sheet."""
    return (
        f":root{{color-scheme:light dark;{variables(dark=False)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{variables(dark=True)}}}}}"
        f"{_RULES}{picking(_MOST_ROWS)}"
        f"@media screen and (max-width:640px){{{_NARROW}}}@media print{{:root{{color-scheme:light}}{_PAPER}}}"
    )
