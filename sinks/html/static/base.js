// Data, text, elements, and charts that are drawn once they are visible.
// Elements are created and their text is set: HTML is never built from the text of a run.

const DATA = JSON.parse(document.getElementById('data').textContent);
const RUNS = DATA.runs, MANY = DATA.compares, RUN = RUNS[0];
const COLOURS = 10, RELOAD_MS = 5000, MANY_ROWS = 100;
const state = new URLSearchParams(location.hash.slice(1));

// Text ------------------------------------------------------------------------------------------
const CONTROL = new RegExp('[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u2028\\u2029' +
  '\\u202a-\\u202e\\u2066-\\u2069]', 'g');
const clean = (text) => String(text).replace(CONTROL,
  (c) => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'));
const own = (object, name) => Object.hasOwn(object, name) ? object[name] : undefined;
// plotly interprets tags in its strings.
const esc = (text) => clean(text).replace(/&/g, '&amp;').replace(/</g, '&lt;')
  .replace(/>/g, '&gt;');
const fmt = (value) => {
  if (value === null || value === undefined) return '–';
  if (value === 'Infinity') return '∞';
  if (value === '-Infinity') return '−∞';
  if (typeof value !== 'number') return clean(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-4 || size >= 1e7) ? value.toExponential(3)
    : String(Number(value.toPrecision(5)));
};
const took = (seconds) => {
  if (typeof seconds !== 'number') return '–';
  if (seconds < 60) return seconds.toFixed(1) + ' s';
  const s = Math.round(seconds), two = (n) => String(n).padStart(2, '0');
  if (s < 3600) return Math.floor(s / 60) + ' min ' + two(s % 60) + ' s';
  return Math.floor(s / 3600) + ' h ' + two(Math.floor(s % 3600 / 60)) + ' min';
};
const when = (time) => typeof time === 'number' ? new Date(time * 1000).toLocaleString() : '–';
const epochText = (epoch) => typeof epoch === 'number' ? 'epoch ' + (epoch + 1) : '';

// Elements --------------------------------------------------------------------------------------
const h = (tag, attributes, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === 'on') for (const [type, f] of Object.entries(value)) {
      element.addEventListener(type, f);
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? '' : String(value));
    }
  }
  for (const child of children.flat(3)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : clean(child));
  }
  return element;
};
const sections = [];
const section = (id, title, ...content) => {
  const element = h('section', {id}, h('h2', {}, title), ...content);
  sections.push([id, title, element]);
  return element;
};
const grid = (headers, rows, attributes) => h('div', {class: 'scroll card'},
  h('table', attributes, h('thead', {}, h('tr', {}, headers.map((c) => c instanceof Node ? c
    : h('th', {}, c)))), h('tbody', {}, rows)));

const set = (name, value) => {
  if (value === null || value === '' || value === '0') state.delete(name);
  else state.set(name, value);
  history.replaceState(null, '', '#' + state.toString());
};
const button = (text, pressed, action) => h('button', {type: 'button', 'aria-pressed': pressed,
  on: {click: action}}, text);
const toggle = (name, text, redraw) => {
  const element = button(text, state.get(name) === '1', () => {
    const on = state.get(name) !== '1';
    set(name, on ? '1' : null);
    element.setAttribute('aria-pressed', on);
    redraw();
  });
  element.id = 'toggle-' + name;
  return element;
};

// Charts ----------------------------------------------------------------------------------------
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (i) => css('--c' + i % COLOURS);
const charts = new Set();
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = entry.target.chart;
    chart.near = entry.isIntersecting;
    if (chart.near && chart.due) draw(chart);
  }
}, {rootMargin: '500px'});
let zoomed = 0;
const draw = (chart) => {
  if (!window.Plotly) {
    chart.div.textContent = 'plotly.min.js is missing next to this page: no charts.';
    return;
  }
  chart.due = false;
  const {traces, layout} = chart.make();
  const axis = {gridcolor: css('--grid'), zerolinecolor: css('--line'), automargin: true};
  const base = {
    margin: {l: 48, r: 12, t: 8, b: 36}, paper_bgcolor: 'rgba(0,0,0,0)',
    plot_bgcolor: 'rgba(0,0,0,0)', font: {color: css('--ink'), size: 12},
    hoverlabel: {bgcolor: css('--card'), bordercolor: css('--line'), font: {color: css('--ink')}},
    legend: {orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom', bgcolor: 'rgba(0,0,0,0)'},
    modebar: {bgcolor: 'rgba(0,0,0,0)', color: css('--soft'), activecolor: css('--accent')},
    uirevision: 'kept', ...layout,
    xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis},
  };
  Plotly.react(chart.div, traces, base, {displaylogo: false, responsive: true,
    modeBarButtons: [['toImage', 'resetScale2d']]});
  chart.div.dataset.traces = traces.length;
  if (!chart.listens) {
    chart.listens = true;
    chart.div.on('plotly_relayout', (change) => {
      if ('xaxis.range[0]' in change || 'yaxis.range[0]' in change) zoomed += 1;
      if ('xaxis.autorange' in change) zoomed = 0;
    });
  }
};
const chartOf = (make, attributes) => {
  const div = h('div', {class: 'chart', ...attributes});
  const chart = {div, make, due: true, near: false};
  div.chart = chart;
  charts.add(chart);
  watcher.observe(div);
  return div;
};
const redraw = (filter) => {
  for (const chart of charts) if (!filter || filter(chart)) {
    chart.due = true;
    if (chart.near) draw(chart);
  }
};
