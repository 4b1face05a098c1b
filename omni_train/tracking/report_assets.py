"""Style and script of the report page: curves on a canvas, with a zoom; no library, no address.

The script draws what the page carries as JSON. Its hash stands in the page's policy, so that no
other script runs there.
"""

from __future__ import annotations

import json

STYLE = """
:root { --ink: #1f2933; --soft: #616e7c; --line: #d9dee4; --good: #1b7f4d; --bad: #b42318;
  --wait: #8a6100; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: #fff;
  margin: 0 auto; max-width: 1200px; padding: 16px; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 4px; } h2 { font-size: 1.15rem; margin: 32px 0 8px; }
h3 { font-size: 1rem; margin: 20px 0 6px; }
p { margin: 4px 0 8px; } .soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; min-width: 100%; }
th, td { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: normal; }
td.text { overflow-wrap: anywhere; min-width: 12em; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.done { color: var(--good); } .failed, .stale { color: var(--bad); }
.preempted, .running { color: var(--wait); } .planned { color: var(--soft); }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: 8px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 10px; font-size: 0.82rem; }
figcaption b { flex: 1 1 100%; } figcaption button { font: inherit; margin-left: auto; }
canvas { width: 100%; height: 200px; display: block; touch-action: pan-y; cursor: crosshair; }
audio { width: 100%; min-width: 180px; max-width: 320px; display: block; }
img { max-width: 100%; height: auto; }
.sample { max-width: 160px; max-height: 160px; display: block; } video.sample { min-width: 160px; }
svg { max-width: none; height: auto; } details { margin: 6px 0; } summary { cursor: pointer; }
code { font-size: 0.85em; }
@media (max-width: 420px) { .charts { grid-template-columns: 1fr; } body { padding: 10px; } }
"""

# Of the series of a chart, in order; the legend has the same.
COLORS = (
    *("#1f6feb", "#c2410c", "#15803d", "#9333ea"),
    *("#0e7490", "#b91c1c", "#854d0e", "#be185d"),
)

_CHARTS = """
const number = (v) => v === 0 ? '0' : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3
  ? v.toExponential(1) : String(+v.toPrecision(4));
function ticks(low, high, count) {
  const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= raw);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(v);
  return found;
}
function chart(figure, data) {
  const canvas = figure.querySelector('canvas'), pen = canvas.getContext('2d');
  const reset = figure.querySelector('button'), readout = figure.querySelector('.readout');
  const all = data.series.flatMap((s) => s.points.map((p) => p[0]));
  const full = [Math.min(...all), Math.max(...all)];
  let range = full, drag = null, at = null;
  const left = 52, bottom = 20, top = 8, right = 14;
  const place = (x, w) => left + (x - range[0]) / (range[1] - range[0] || 1) * (w - left - right);
  const value = (px, w) => range[0] + (px - left) / (w - left - right) * (range[1] - range[0]);
  function draw() {
    const w = canvas.clientWidth, h = canvas.clientHeight, dense = window.devicePixelRatio || 1;
    canvas.width = w * dense; canvas.height = h * dense; pen.setTransform(dense, 0, 0, dense, 0, 0);
    pen.clearRect(0, 0, w, h); pen.font = '11px system-ui, sans-serif';
    const inside = (p) => p[0] >= range[0] && p[0] <= range[1];
    const ys = data.series.flatMap((s) => s.points.filter(inside).map((p) => p[1]));
    if (!ys.length) return;
    let low = Math.min(...ys), high = Math.max(...ys);
    if (low === high) { low -= Math.abs(low) * 0.1 || 1; high += Math.abs(high) * 0.1 || 1; }
    const y = (v) => top + (high - v) / (high - low) * (h - top - bottom);
    pen.fillStyle = '#616e7c'; pen.strokeStyle = '#e4e7eb'; pen.lineWidth = 1;
    pen.textAlign = 'right'; pen.textBaseline = 'middle';
    for (const v of ticks(low, high, 6)) {
      pen.beginPath(); pen.moveTo(left, y(v)); pen.lineTo(w - right, y(v)); pen.stroke();
      pen.fillText(number(v), left - 5, y(v));
    }
    pen.textAlign = 'center'; pen.textBaseline = 'top';
    for (const v of ticks(range[0], range[1] || 1, Math.max(2, w / 110)))
      if (Number.isInteger(v)) pen.fillText(String(v), place(v, w), h - bottom + 5);
    data.series.forEach((s, n) => {
      pen.strokeStyle = COLORS[n % COLORS.length]; pen.fillStyle = pen.strokeStyle;
      pen.lineWidth = 1.5; pen.beginPath();
      s.points.filter(inside).forEach((p, i) =>
        i ? pen.lineTo(place(p[0], w), y(p[1])) : pen.moveTo(place(p[0], w), y(p[1])));
      pen.stroke();
      if (s.points.length === 1)
        pen.fillRect(place(s.points[0][0], w) - 2, y(s.points[0][1]) - 2, 4, 4);
    });
    if (drag) {
      pen.fillStyle = 'rgba(31, 111, 235, 0.15)';
      pen.fillRect(drag[0], top, drag[1] - drag[0], h - top - bottom);
    }
    if (at !== null) {
      pen.strokeStyle = '#9aa5b1'; pen.beginPath(); pen.moveTo(place(at, w), top);
      pen.lineTo(place(at, w), h - bottom); pen.stroke();
    }
    reset.hidden = range === full;
  }
  function say(px) {
    const x = value(px, canvas.clientWidth), series = data.series;
    const near = (s) => s.points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    at = near(series[0])[0];
    readout.textContent = 'step ' + at + ': ' + series.map((s) => number(near(s)[1])).join(', ');
  }
  const px = (event) => Math.min(canvas.clientWidth - right,
    Math.max(left, event.clientX - canvas.getBoundingClientRect().left));
  canvas.addEventListener('pointerdown', (e) => { drag = [px(e), px(e)];
    canvas.setPointerCapture(e.pointerId); });
  canvas.addEventListener('pointermove', (e) => { if (drag) drag[1] = px(e); say(px(e)); draw(); });
  canvas.addEventListener('pointerleave', () => { at = null; readout.textContent = ''; draw(); });
  canvas.addEventListener('pointercancel', () => { drag = null; draw(); });
  canvas.addEventListener('pointerup', () => {
    const [a, b] = [...drag].sort((p, q) => p - q); drag = null;
    if (b - a > 6) range = [value(a, canvas.clientWidth), value(b, canvas.clientWidth)];
    draw();
  });
  const whole = () => { range = full; draw(); };
  canvas.addEventListener('dblclick', whole); reset.addEventListener('click', whole);
  new ResizeObserver(draw).observe(canvas);
}
const curves = JSON.parse(document.getElementById('curves').textContent);
document.querySelectorAll('figure[data-chart]').forEach((figure) =>
  chart(figure, curves[+figure.dataset.chart]));
"""

SCRIPT = f"'use strict';\nconst COLORS = {json.dumps(COLORS)};{_CHARTS}"
