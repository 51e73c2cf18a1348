// Draws the plots in the colours of page.css. Each figure is JSON after the element it is drawn in. All colours are in the
// template, so a change of colour scheme only replaces the template.
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
      // On touch screens, dragging on a plot scrolls the page.
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
      responsive: true, displayModeBar: false,  // the toolbar would cover titles and points
    });
  }
}
dark.addEventListener("change", draw);
draw();

// The page of a run that goes on says how old it is, and loads itself again unless somebody is reading a plot or the tab is hidden.
const RELOAD = 30_000, STILL = 60_000;  // milliseconds
const running = document.querySelector(".running");
if (running) {
  let touched = -STILL;
  for (const event of ["pointerdown", "wheel", "keydown", "touchstart"])
    addEventListener(event, () => { touched = performance.now(); }, {passive: true});
  const age = seconds => seconds < 90 ? `${Math.round(seconds)} seconds ago`
    : seconds < 5400 ? `${Math.round(seconds / 60)} minutes ago` : `${Math.round(seconds / 3600)} hours ago`;
  const tell = () => {
    for (const time of running.querySelectorAll("time"))
      time.textContent = age(Math.max(0, (Date.now() - Date.parse(time.dateTime)) / 1000));
  };
  tell();
  setInterval(tell, 5_000);
  setInterval(() => { if (!document.hidden && performance.now() - touched >= STILL) location.reload(); }, RELOAD);
}
