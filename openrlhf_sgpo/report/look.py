"""How a page looks: its style sheet, and the script that draws the plots in the colours of that sheet.

The sheet's variables are the only place where colours stand. The series are colour-blind safe (after Okabe and Ito), lighter
in the dark. Paper is always light: the dark colours are for screens.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --ink: #1c2230; --quiet: #5b6475; --line: #dfe3ea; --accent: #0060a0;
  --warning: #8a3b00; --warning-panel: #fff4e8;
  --series-1: #0072b2; --series-2: #d98200; --series-3: #009e73; --series-4: #b8578f;
  --series-5: #c44e00; --series-6: #3a9fd8; --series-7: #6b6b6b; --series-8: #8f8400;
  --low: #d98200; --middle: #f6f7f9; --high: #0072b2;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #12151c; --panel: #1a1f29; --ink: #e6e9f0; --quiet: #9aa4b5; --line: #2e3644; --accent: #6cb8f0;
    --warning: #ffc48a; --warning-panel: #2d2216;
    --series-1: #5ab4ec; --series-2: #f0b040; --series-3: #35c79a; --series-4: #e391c3;
    --series-5: #f58a4b; --series-6: #9fd4f5; --series-7: #b0b0b0; --series-8: #d9cf4a;
    --low: #f0b040; --middle: #232936; --high: #5ab4ec;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: var(--ink); background: var(--page); -webkit-text-size-adjust: 100%; overflow-wrap: break-word;
}
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { margin: 3.25rem 0 1rem; font-size: 1.3rem; line-height: 1.3; letter-spacing: -0.01em; }
h3 { margin: 1.75rem 0 0.5rem; font-size: 1rem; line-height: 1.4; overflow-wrap: anywhere; }
p { margin: 0.5rem 0; max-width: 46rem; }
a { color: var(--accent); text-underline-offset: 0.15em; }
.kind { margin: 0 0 0.25rem; color: var(--accent); font-weight: 600; font-size: 0.85rem; }
.verdict { margin: 1rem 0 0; font-size: 1.0625rem; }
.verdict p { margin: 0.35rem 0; }
.quiet, figcaption p, footer { color: var(--quiet); font-size: 0.875rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin-top: 1.25rem; font-size: 0.9rem; }
dl.facts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); gap: 1rem 1.5rem; margin: 1.5rem 0 0;
}
dl.facts dt { color: var(--quiet); font-size: 0.8rem; }
dl.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.warnings {
  margin: 1.5rem 0 0; padding: 1rem 1.25rem; border-left: 4px solid var(--warning); background: var(--warning-panel);
}
.warnings strong { color: var(--warning); }
.warnings ul { margin: 0.5rem 0 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; margin: 0.75rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 1.1rem 0.4rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { color: var(--quiet); font-weight: 500; vertical-align: bottom; border-bottom-color: var(--quiet); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); padding-right: 1.5rem; }
tbody th { font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem 2rem; }
figure { margin: 1rem 0 0; min-width: 0; break-inside: avoid; }
figcaption h3 { margin: 0; }
figcaption p { margin: 0 0 0.25rem; }
.plot { width: 100%; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; font-weight: 600; color: var(--accent); }
pre {
  margin: 0.75rem 0; padding: 1rem; background: var(--panel); border-radius: 6px; overflow-x: auto;
  font-size: 0.8125rem; line-height: 1.5;
}
article { margin: 1.25rem 0 2rem; break-inside: avoid; }
.prompt { padding-left: 0.9rem; border-left: 3px solid var(--accent); }
.prompt p, .answer p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-width: none; }
.answers {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 0.75rem; margin-top: 0.75rem;
}
.answer { padding: 0.75rem 1rem; background: var(--panel); border-radius: 6px; font-size: 0.9375rem; min-width: 0; }
.answer h4 { margin: 0 0 0.35rem; font-size: 0.85rem; overflow-wrap: anywhere; }
.answer h4 span, .prompt span { color: var(--quiet); font-weight: 400; font-size: 0.8rem; }
.answer h4 span { display: block; }
.answer p + p { margin-top: 0.75rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); }
@media screen {
  .answer { max-height: 28rem; overflow-y: auto; }
}
/* Plots keep their width from the screen: the sheet is as wide, in the proportions of A4, and printers scale it. */
@page { size: 1216px 1720px; margin: 48px; }
@media print {
  body { padding: 0; }
  nav, details:not([open]) { display: none; }
  .answer, pre { border: 1px solid var(--line); }
  .scroll { overflow: visible; }
}
"""

# Each figure stands as JSON behind the element that it is drawn in. The template carries the colours of the sheet, so that a
# change of scheme, or the way to paper, is another template and nothing else.
SCRIPT = """
const dark = matchMedia("screen and (prefers-color-scheme: dark)");
function template() {
  const css = getComputedStyle(document.documentElement);
  const color = name => css.getPropertyValue("--" + name).trim();
  const quiet = {color: color("quiet")};
  const axis = {
    gridcolor: color("line"), linecolor: color("line"), zerolinecolor: color("line"), tickfont: quiet, automargin: true,
    ticks: "", ticklabelstandoff: 4, exponentformat: "power", title: {font: quiet, standoff: 8},
  };
  const scale = [[0, color("low")], [0.5, color("middle")], [1, color("high")]];
  return {
    layout: {
      font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: color("ink")},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      colorway: [1, 2, 3, 4, 5, 6, 7, 8].map(number => color("series-" + number)),
      margin: {l: 8, r: 12, t: 12, b: 8}, xaxis: axis, yaxis: axis, bargap: 0.3,
      polar: {
        bgcolor: "rgba(0,0,0,0)",
        radialaxis: {gridcolor: color("line"), linecolor: color("line"), tickfont: quiet},
        angularaxis: {gridcolor: color("line"), linecolor: color("line")},
      },
      legend: {
        orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", traceorder: "normal",
      },
      hoverlabel: {bgcolor: color("panel"), bordercolor: color("line"), font: {color: color("ink")}},
      shapedefaults: {line: {color: color("quiet"), width: 1, dash: "dot"}},
      annotationdefaults: {font: quiet},
      // A finger on a plot scrolls the page.
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    },
    data: {heatmap: [{colorscale: scale}], bar: [{error_x: {color: color("quiet")}}]},
  };
}
function draw() {
  const look = template();
  for (const element of document.querySelectorAll(".plot")) {
    const {data, layout} = JSON.parse(element.nextElementSibling.textContent);
    Plotly.react(element, data, {...layout, template: look}, {
      responsive: true, displayModeBar: false,  // a bar of tools would cover titles and points
    });
  }
}
dark.addEventListener("change", draw);
draw();
"""
