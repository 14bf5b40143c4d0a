"""The page's script. It makes elements and sets their text, and never HTML of what a run says."""

from __future__ import annotations

JS = r"""'use strict';
(() => {
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
// plotly reads tags in its texts.
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
    chart.div.textContent = 'plotly.min.js is not beside this page: no charts.';
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

// Metrics ---------------------------------------------------------------------------------------
const label = (run) => {
  const name = run.about.name || run.run;
  const twin = RUNS.some((other) => other !== run && (other.about.name || other.run) === name);
  return twin ? name + ' (' + run.run + ')' : name;
};
const between = (value, from, to) => {  // linear, and beyond the ends with the last slope
  let i = from.findIndex((v) => v >= value);
  if (i < 0) i = from.length - 1;
  const a = i === 0 ? [0, 0] : [from[i - 1], to[i - 1]];
  const width = from[i] - a[0];
  return width ? a[1] + (to[i] - a[1]) * (value - a[0]) / width : to[i];
};
const places = (run, series) => {
  const axis = state.get('x') || DEFAULT_AXIS;
  if (axis === 'time') return series.t;
  const ends = run.ends;
  if (axis === series.axis || !ends.x.length) return series.x;
  const steps = ends.y, epochs = ends.x;
  return axis === 'step' ? series.x.map((x) => between(x, epochs, steps))
    : series.x.map((x) => between(x, steps, epochs));
};
const smooth = (values, weight) => {
  let sum = 0, n = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = sum * weight + (1 - weight) * value;
    n += 1;
    return sum / (1 - weight ** n);
  });
};
const PHASES = ['train', 'validation', 'test'];
const DASHES = ['solid', 'dot', 'dash'];
const groups = new Map();
for (const run of RUNS) for (const series of run.series) {
  if (!groups.has(series.base)) groups.set(series.base, []);
  groups.get(series.base).push([run, series]);
}
const goalOf = (run, name) => {
  for (const [pattern, goal] of Object.entries(run.goals)) {
    const parts = pattern.split('*');
    if (name === pattern || (parts.length === 2 && name.startsWith(parts[0])
      && name.endsWith(parts[1]))) return goal;
  }
  return null;
};
const rank = (base) => {
  if (groups.get(base).some(([run, s]) => goalOf(run, s.name))) return 1;
  if (/loss|reward|return/i.test(base)) return 0;
  return groups.get(base).every(([, s]) => s.phase === 'system') || /^lr\b/.test(base) ? 3 : 2;
};
const bases = [...groups.keys()];
bases.sort((a, b) => rank(a) - rank(b));
const AXES = new Set(RUNS.flatMap((run) => run.series.map((s) => s.axis)));
const DEFAULT_AXIS = AXES.has('epoch') || RUNS.some((run) => run.ends.x.length) ? 'epoch' : 'step';
const metricTraces = (base) => {
  const weight = Math.min(Math.max(Number(state.get('smooth')) || 0, 0), 0.99), traces = [];
  const phases = [...new Set(groups.get(base).map(([, s]) => s.phase))];
  const others = phases.filter((p) => !PHASES.includes(p));
  const names = new Set(groups.get(base).map(([, s]) => s.name + '|' + s.phase));
  const twins = names.size > phases.length;
  groups.get(base).forEach(([run, series], index) => {
    const known = PHASES.indexOf(series.phase);
    const phase = known < 0 ? 3 + others.indexOf(series.phase) : known;
    const hue = MANY ? RUNS.indexOf(run) : twins ? index : phase;
    const fine = series.axis === 'step' && AXES.has('epoch');
    const what = (twins ? series.name + ' ' : '') + series.phase + (fine ? ' (steps)' : '');
    const name = esc(MANY ? label(run) + (phases.length > 1 || fine ? ' · ' + what : '') : what);
    const x = places(run, series);
    const y = series.y.map((v) => typeof v === 'number' ? v : null);
    const line = {color: colour(hue), width: fine ? 1.2 : 2,
      dash: MANY && phases.length > 1 ? DASHES[phase % 3] : 'solid'};
    const shared = {x, type: 'scatter', mode: x.length <= 60 && !fine ? 'lines+markers' : 'lines',
      marker: {size: 4}, connectgaps: false, line, name, hovertemplate: '%{y:.5~g}'};
    if (weight > 0 && y.length > 2) {
      traces.push({...shared, y, opacity: 0.28, showlegend: false, hoverinfo: 'skip',
        hovertemplate: null});
      traces.push({...shared, y: smooth(y, weight), mode: 'lines'});
    } else traces.push({...shared, y});
  });
  const axis = state.get('x') || DEFAULT_AXIS;
  return {traces, layout: {
    hovermode: 'x unified', showlegend: true,
    xaxis: {title: {text: axis === 'time' ? 'seconds' : axis}, hoverformat: '.5~g'},
    yaxis: {type: state.get('log') === '1' ? 'log' : 'linear'},
  }};
};
const oddText = (base) => groups.get(base).filter(([, s]) => s.odd).map(([run, s]) => {
  const i = s.y.findIndex((v) => typeof v !== 'number');
  return (MANY ? label(run) + ' ' : '') + s.phase + ': ' + s.odd + ' not finite' +
    (i < 0 ? '' : ' (' + fmt(s.y[i]) + ' at ' + s.axis + ' ' + s.x[i] + ')');
}).join(', ');
const metricsSection = () => {
  const cards = bases.map((base) => {
    const odd = oddText(base);
    const card = h('div', {class: 'card metric', 'data-base': base}, h('h3', {}, base),
      chartOf(() => metricTraces(base), {'data-kind': 'metric'}),
      odd && h('div', {class: 'small warning wrap'}, odd));
    card.words = (base + ' ' + groups.get(base).map(([, s]) => s.name).join(' ')).toLowerCase();
    return card;
  });
  const none = h('p', {class: 'soft', hidden: true}, 'No chart has this in its name.');
  const filter = () => {
    const wanted = (state.get('chart') || '').toLowerCase();
    for (const card of cards) card.hidden = !card.words.includes(wanted);
    none.hidden = cards.some((card) => !card.hidden);
  };
  const again = () => redraw((chart) => chart.div.dataset.kind === 'metric');
  const shown = h('output', {class: 'small soft'}, state.get('smooth') || '0');
  const slider = h('input', {type: 'range', min: 0, max: 0.99, step: 0.01, id: 'smooth',
    value: state.get('smooth') || 0, on: {input: (event) => {
      set('smooth', event.target.value);
      shown.textContent = event.target.value;
      again();
    }}});
  const select = h('select', {id: 'axis', on: {change: (event) => {
    set('x', event.target.value);
    again();
  }}}, ['epoch', 'step', 'time'].map((axis) => h('option', {value: axis,
    selected: axis === (state.get('x') || DEFAULT_AXIS)}, axis)));
  const search = h('input', {type: 'search', id: 'chart', placeholder: 'find a chart',
    value: state.get('chart') || '', 'aria-label': 'find a chart', on: {input: (event) => {
      set('chart', event.target.value);
      filter();
    }}});
  filter();
  return section('metrics', 'Metrics', h('div', {class: 'row tools card'},
    toggle('log', 'log scale', again), h('label', {class: 'row'}, 'smoothing', slider, shown),
    h('label', {class: 'row'}, 'over', select), search), h('p', {class: 'small soft'},
    'Drag to zoom, double-click to go back, click a name to hide its line.'),
  h('div', {class: 'grid'}, cards), none);
};

// At a glance -----------------------------------------------------------------------------------
const tile = (title, value, more) => h('div', {class: 'card tile'}, h('span', {}, title),
  h('b', {}, value), more && h('span', {}, more));
const elapsed = (run) => run.earlier + Math.max((run.last || 0) - (run.first || 0), 0);
const bestText = (run) => run.best ? fmt(run.best.value) : '–';
const header = () => {
  const about = RUN.about, share = RUN.epochs ? RUN.done / RUN.epochs
    : RUN.steps && RUN.step !== null ? RUN.step / RUN.steps : null;
  const facts = [RUN.run, about.project, about.group, about.job_type, about.task,
    [about.framework, about.framework_version].filter(Boolean).join(' '),
    RUN.attempt > 1 && 'attempt ' + RUN.attempt, about.world_size > 1 && about.world_size +
    ' processes', ...(about.tags || []).map((tag) => '#' + tag)].filter(Boolean);
  const quiet = Date.now() / 1000 - (RUN.last || 0);
  const tiles = [
    tile('epoch', RUN.epochs ? RUN.done + ' of ' + RUN.epochs : RUN.done || '–',
      RUN.step === null ? '' : 'step ' + RUN.step + (RUN.steps ? ' of ' + RUN.steps : '')),
    tile('elapsed', took(elapsed(RUN)), 'since ' + when(RUN.first)),
    RUN.status === 'running' && tile('time left', RUN.eta === null ? '–' : took(RUN.eta),
      quiet > 60 ? 'last heard of ' + took(quiet) + ' ago' : ''),
    RUN.best && tile('best ' + RUN.best.metric, bestText(RUN), epochText(RUN.best.epoch)),
    RUN.worst && tile('worst class', RUN.worst.name, RUN.worst.metric + ' ' +
      fmt(RUN.worst.value)),
    ...Object.entries(RUN.final).slice(0, 6).map(([name, value]) => tile('final ' + name,
      fmt(value))),
  ];
  return h('header', {}, h('div', {class: 'row'}, h('h1', {}, about.name || RUN.run),
    h('span', {class: 'badge ' + RUN.status, id: 'status'}, RUN.status),
    RUN.reason && h('span', {class: 'soft wrap'}, RUN.reason)),
  h('div', {class: 'soft small wrap'}, facts.join(' · ')),
  about.notes && h('pre', {class: 'soft'}, about.notes),
  share !== null && h('div', {class: 'bar', role: 'progressbar', 'aria-valuemin': 0,
    'aria-valuemax': 100, 'aria-valuenow': Math.round(share * 100)}, bar(share)),
  h('div', {class: 'tiles', style: null}, tiles), failure(),
  RUN.alerts.slice(-3).reverse().map(alertCard));
};
const bar = (share) => {
  const element = h('div', {});
  element.style.width = Math.min(Math.max(share, 0), 1) * 100 + '%';
  return element;
};
const failure = () => RUN.error && h('div', {class: 'card panel', id: 'failure'},
  h('b', {class: 'wrap'}, RUN.error.type + (RUN.error.message ? ': ' + RUN.error.message : '')),
  RUN.error.traceback && h('details', {open: RUN.status === 'failed'},
    h('summary', {class: 'small'}, 'traceback'), h('pre', {}, RUN.error.traceback)));
const alertCard = (alert) => h('div', {class: 'card wrap alert'},
  h('span', {class: 'badge ' + alert.level}, alert.level), ' ', h('b', {}, alert.title), ' ',
  alert.text, ' ', h('span', {class: 'soft small'}, when(alert.time)));
const glance = () => {
  const rows = [], seen = new Set();
  const add = (name, phase, cells) => rows.push(h('tr', {}, h('td', {class: 'wrap'}, name),
    h('td', {}, phase), ...cells));
  const at = (pair, series) => pair ? fmt(pair[0]) + ' (' + series.axis + ' ' + pair[1] + ')' : '–';
  for (const base of bases) for (const [, s] of groups.get(base)) {
    if (s.axis === 'step' && RUN.series.some((o) => o.name === s.name && o.phase === s.phase
      && o.axis === 'epoch')) continue;
    const goal = goalOf(RUN, s.name), cell = (text, kind) => h('td', {class: 'n' +
      (kind === goal ? ' best' : '')}, text);
    seen.add(s.name);
    add(s.name, s.phase, [cell(fmt(s.y[s.y.length - 1])), cell(at(s.low, s), 'min'),
      cell(at(s.high, s), 'max'),
      cell(fmt(s.phase === 'train' ? undefined : own(RUN.final, s.name)))]);
  }
  for (const [name, value] of Object.entries(RUN.final)) if (!seen.has(name)) {
    add(name, 'final', [null, null, null].map(() => h('td', {class: 'n'}, '–'))
      .concat(h('td', {class: 'n'}, fmt(value))));
  }
  return rows.length ? section('values', 'Values', grid(['metric', 'phase',
    ...['last', 'lowest', 'highest', 'final'].map((t) => h('th', {class: 'n'}, t))], rows)) : null;
};

// Curves and matrices ---------------------------------------------------------------------------
const CLASSES = [...new Set(Object.values(RUN.curves).flatMap((c) => c.classes))];
const hidden = () => new Set((state.get('hide') || '').split('\n').filter(Boolean));
const num = (values) => values.map((v) => typeof v === 'number' ? v : null);
const curveTraces = (curve) => {
  const off = hidden(), many = curve.classes.length > 1;
  const traces = curve.classes.map((name, i) => ({x: num(curve.x), y: num(curve.y[i]),
    name: esc(name), type: 'scatter', mode: curve.x.length > 1 ? 'lines' : 'markers',
    visible: !off.has(name), line: {color: colour(CLASSES.indexOf(name)), width: many ? 1.4 : 2},
    hovertemplate: '%{y:.4~g}'}));
  if (many) traces.push({x: num(curve.x), y: num(curve.mean), name: 'mean', type: 'scatter',
    mode: 'lines', line: {color: css('--ink'), width: 3}, visible: !off.has('mean of all'),
    hovertemplate: '%{y:.4~g}'});
  return {traces, layout: {showlegend: false, hovermode: curve.classes.length > 12 ? 'closest'
    : 'x unified', xaxis: {title: {text: esc(curve.x_label)}},
  yaxis: {title: {text: esc(curve.y_label)}}}};
};
const curvesSection = () => {
  const keys = Object.keys(RUN.curves);
  if (!keys.length) return null;
  const again = () => redraw((chart) => chart.div.dataset.kind === 'curve');
  const chips = h('div', {class: 'chips', id: 'classes'});
  const fill = () => {
    chips.replaceChildren(...[...CLASSES, 'mean of all'].map((name, i) => {
      const dot = h('i', {});
      dot.style.background = i < CLASSES.length ? colour(i) : css('--ink');
      const chip = button([dot, name], !hidden().has(name), () => {
        const off = hidden();
        if (!off.delete(name)) off.add(name);
        hide(off);
      });
      return chip;
    }));
  };
  const hide = (off) => {
    set('hide', [...off].join('\n'));
    fill();
    again();
  };
  fill();
  theme.push(fill);
  return section('curves', 'Curves by class', h('div', {class: 'row tools'},
    h('button', {type: 'button', id: 'classes-all', on: {click: () => hide(new Set())}},
      'all classes'),
    h('button', {type: 'button', id: 'classes-none', on: {click: () => hide(new Set(CLASSES))}},
      'mean only')), h('p', {class: 'small soft'}, 'Click a class to hide or show it.'), chips,
  h('div', {class: 'grid'}, keys.map((key) => h('div', {class: 'card curve'},
    h('h3', {}, RUN.curves[key].title + ' ', h('span', {class: 'soft'},
      epochText(RUN.curves[key].epoch))),
    chartOf(() => curveTraces(RUN.curves[key]), {'data-kind': 'curve'})))));
};
const matrixTraces = (found) => {
  const share = found.normalized || state.get('norm') === '1';
  const z = found.matrix.map((row) => {
    const counts = num(row), sum = counts.reduce((a, b) => a + (b || 0), 0);
    return share && !found.normalized ? counts.map((v) => v === null || !sum ? null : v / sum)
      : counts;
  });
  const names = z.map((_, i) => found.classes[i] === undefined ? String(i) : found.classes[i]);
  const ticks = names.map((_, i) => i), few = names.length <= 60;
  const axis = {tickvals: few ? ticks : undefined, ticktext: few ? names.map(esc) : undefined,
    showgrid: false, zeroline: false};
  return {traces: [{type: 'heatmap', z, x: ticks, y: ticks, zmin: 0, zmax: share ? 1 : undefined,
    colorscale: [[0, css('--low')], [1, css('--high')]], xgap: 1, ygap: 1,
    texttemplate: names.length <= 20 ? (share ? '%{z:.2f}' : '%{z}') : undefined,
    customdata: names.map((a) => names.map((b) => [esc(a), esc(b)])),
    hovertemplate: 'true %{customdata[0]}<br>predicted %{customdata[1]}<br>%{z:.5~g}' +
      '<extra></extra>', colorbar: {thickness: 12, outlinewidth: 0}}],
  layout: {margin: {l: 70, r: 10, t: 10, b: 70}, xaxis: {...axis, title: {text: 'predicted'}},
    yaxis: {...axis, title: {text: 'true'}, autorange: 'reversed'}}};
};
const matrixSection = () => {
  const keys = Object.keys(RUN.matrices);
  if (!keys.length) return null;
  const again = () => redraw((chart) => chart.div.dataset.kind === 'matrix');
  return section('confusion', 'Confusion matrix', h('div', {class: 'row tools'},
    toggle('norm', 'shares of each true class', again)),
  h('div', {class: 'grid'}, keys.map((key) => h('div', {class: 'card'}, h('h3', {}, key + ' ',
    h('span', {class: 'soft'}, epochText(RUN.matrices[key].epoch))),
  chartOf(() => matrixTraces(RUN.matrices[key]), {'data-kind': 'matrix', class: 'chart tall'})))));
};
const histogramsSection = () => {
  const keys = Object.keys(RUN.histograms);
  return keys.length ? section('histograms', 'Histograms', h('div', {class: 'grid'},
    keys.map((key) => h('div', {class: 'card'}, h('h3', {}, key), chartOf(() => {
      const {counts, edges} = RUN.histograms[key], e = num(edges);
      return {traces: [{type: 'bar', x: counts.map((_, i) => (e[i] + e[i + 1]) / 2),
        width: counts.map((_, i) => e[i + 1] - e[i]), y: num(counts),
        marker: {color: colour(0)}, hovertemplate: '%{y}<extra></extra>'}],
      layout: {bargap: 0, showlegend: false}};
    }, {'data-kind': 'histogram'}))))) : null;
};

// Tables, pictures, texts -----------------------------------------------------------------------
const order = (a, b) => {
  const [x, y] = [a, b].map((v) => typeof v === 'number' ? v : null);
  if (x !== null && y !== null) return x - y;
  if (x !== null || y !== null) return x !== null ? -1 : 1;
  return String(a === null ? '' : a).localeCompare(String(b === null ? '' : b));
};
const tableCard = (key) => {
  const table = RUN.tables[key], worst = RUN.worst && RUN.worst.key === key ? RUN.worst : null;
  let by = table.by === undefined ? -1 : table.columns.indexOf(table.by);
  let sign = by >= 0 && /loss|error/i.test(table.by) ? -1 : 1, all = false;
  const body = h('tbody', {}), more = h('button', {type: 'button', on: {click: () => {
    all = true;
    fill();
  }}});
  const heads = h('tr', {}, table.columns.map((name, i) => h('th', {}, h('button', {
    type: 'button', on: {click: () => {
      sign = by === i ? -sign : 1;
      by = i;
      fill();
    }}}, name))));
  const fill = () => {
    const rows = [...table.rows];
    if (by >= 0) rows.sort((a, b) => sign * order(a[by], b[by]));
    const shown = all ? rows : rows.slice(0, MANY_ROWS);
    body.replaceChildren(...shown.map((row) => {
      const bad = worst && String(row[0]) === worst.name;
      return h('tr', {class: bad ? 'worst' : null}, row.map((cell, i) => h('td',
        {class: typeof cell === 'number' ? 'n' : null}, fmt(cell), i === 0 && bad &&
        h('span', {class: 'failed small'}, ' worst'))));
    }));
    more.textContent = 'show all ' + rows.length + ' rows';
    more.hidden = all || rows.length <= MANY_ROWS;
    [...heads.children].forEach((th, i) => {
      th.setAttribute('aria-sort', i !== by ? 'none' : sign > 0 ? 'ascending' : 'descending');
      th.className = table.rows.some((row) => typeof row[i] === 'number') ? 'n' : '';
    });
  };
  fill();
  return h('div', {class: 'card table', 'data-key': key}, h('h3', {}, key + ' ',
    h('span', {class: 'soft'}, epochText(table.epoch))), h('div', {class: 'scroll'},
    h('table', {}, h('thead', {}, heads), body)), more, table.length > table.rows.length &&
    h('p', {class: 'soft small'}, 'the first ' + table.rows.length + ' of ' + table.length +
    ' rows'));
};
const viewer = h('dialog', {on: {click: () => viewer.close()}}, h('img', {alt: ''}));
const pictureCard = (key) => {
  const items = RUN.pictures[key], last = items.length - 1;
  const image = h('img', {loading: 'lazy', alt: key, on: {click: () => {
    viewer.firstChild.src = image.src;
    viewer.showModal();
  }}});
  const caption = h('span', {});
  const show = (i) => {
    image.src = items[i].file;
    caption.textContent = clean([items[i].caption, epochText(items[i].epoch), items[i].step !== null
      && 'step ' + items[i].step].filter(Boolean).join(' · '));
  };
  show(last);
  return h('figure', {class: 'card'}, image, h('figcaption', {}, h('h3', {}, key), caption,
    last > 0 && h('input', {type: 'range', min: 0, max: last, value: last, 'aria-label':
      'earlier pictures', on: {input: (event) => show(Number(event.target.value))}})));
};
const list = (id, title, keys, card, kind) => keys.length ? section(id, title,
  h('div', {class: 'grid ' + kind}, keys.map(card))) : null;

// Parameters ------------------------------------------------------------------------------------
const paramsSection = () => {
  const names = [...new Set(RUNS.flatMap((run) => Object.keys(run.params)))];
  if (!names.length) return null;
  const differs = (name) => new Set(RUNS.map((run) => own(run.params, name))).size > 1;
  const rows = names.map((name) => {
    const row = h('tr', {'data-param': name}, h('td', {class: 'wrap'}, name),
      RUNS.map((run) => h('td', {}, h('span', {class: 'value'},
        own(run.params, name) === undefined ? '–' : own(run.params, name)))));
    row.words = (name + ' ' + RUNS.map((run) => own(run.params, name)).join(' ')).toLowerCase();
    row.same = MANY && !differs(name);
    return row;
  });
  const none = h('p', {class: 'soft', hidden: true}, MANY ? 'No parameter differs.'
    : 'No parameter has this in it.');
  const filter = () => {
    const wanted = (state.get('param') || '').toLowerCase();
    for (const row of rows) row.hidden = !row.words.includes(wanted)
      || (row.same && state.get('all') !== '1');
    none.hidden = rows.some((row) => !row.hidden);
  };
  filter();
  return section('params', MANY ? 'Parameters that differ' : 'Parameters',
    h('div', {class: 'row tools'}, h('input', {type: 'search', id: 'param', 'aria-label':
      'find a parameter', placeholder: 'find a parameter', value: state.get('param') || '',
    on: {input: (event) => {
      set('param', event.target.value);
      filter();
    }}}), MANY && toggle('all', 'show all', filter)),
    grid(['parameter', ...(MANY ? RUNS.map(label) : ['value'])], rows), none);
};

// Pages -----------------------------------------------------------------------------------------
const pairs = (object) => Object.entries(object).map(([name, value]) => h('tr', {},
  h('td', {}, name), h('td', {}, h('span', {class: 'value'}, fmt(value)))));
const theme = [];
const onePage = () => {
  const parts = [header()], texts = [...RUN.texts].reverse();
  const body = [
    bases.length ? metricsSection() : null, glance(), curvesSection(), matrixSection(),
    list('tables', 'Tables', Object.keys(RUN.tables), tableCard, ''),
    list('pictures', 'Pictures', Object.keys(RUN.pictures), pictureCard, 'pictures'),
    histogramsSection(), paramsSection(),
    Object.keys(RUN.model).length ? section('model', 'Model', grid(['', ''], pairs(RUN.model)))
      : null,
    RUN.checkpoints.length ? section('checkpoints', 'Checkpoints', grid(['kind', 'epoch', 'path',
      'metrics'], RUN.checkpoints.map((c) => h('tr', {}, h('td', {}, c.kind), h('td', {},
      c.epoch === null ? fmt(c.step) : c.epoch + 1), h('td', {class: 'wrap'}, c.path),
      h('td', {}, Object.entries(c.metrics).map(([k, v]) => k + ' ' + fmt(v))
        .join(', ')))))) : null,
    RUN.artifacts.length ? section('artifacts', 'Artifacts', grid(['name', 'kind', 'files'],
      RUN.artifacts.map((a) => h('tr', {}, h('td', {}, a.name), h('td', {}, a.kind), h('td', {},
        h('span', {class: 'value'}, a.paths.join('\n'))))))) : null,
    RUN.alerts.length ? section('alerts', 'Alerts', [...RUN.alerts].reverse().map(alertCard))
      : null,
    texts.length ? section('texts', 'Text', texts.map((t) => h('details', {class: 'card',
      open: texts.length < 4}, h('summary', {class: 'wrap'}, t.key + ' ', h('span',
      {class: 'soft'}, epochText(t.epoch))), h('pre', {}, t.text), t.length > t.text.length &&
      h('p', {class: 'soft small'}, 'the first part of ' + t.length + ' characters')))) : null,
    section('records', 'Records', grid(['record', 'count'], [...pairs(RUN.records),
      h('tr', {}, h('td', {}, h('b', {}, 'all')), h('td', {}, h('b', {},
        Object.values(RUN.records).reduce((a, b) => a + b, 0))))])),
  ];
  return [...parts, h('main', {}, menu(), body, h('footer', {}, 'Last record ' + when(RUN.last) +
    (RUN.about.save_dir ? ', saved in ' + RUN.about.save_dir : '')), viewer)];
};
const menu = () => h('nav', {}, sections.map(([id, title]) => h('button', {type: 'button',
  on: {click: () => document.getElementById(id).scrollIntoView()}}, title)));
const comparePage = () => {
  const finals = [...new Set(RUNS.flatMap((run) => Object.keys(run.final)))];
  const rows = RUNS.map((run, i) => {
    const dot = h('span', {}, '● ');
    dot.style.color = colour(i);
    theme.push(() => dot.style.color = colour(i));
    return h('tr', {}, h('td', {}, dot, label(run)), h('td', {class: run.status}, run.status),
      h('td', {class: 'n'}, run.epochs ? run.done + ' of ' + run.epochs : run.done || '–'),
      h('td', {class: 'n'}, took(elapsed(run))), h('td', {}, run.best ? run.best.metric + ' ' +
        bestText(run) + ' ' + epochText(run.best.epoch) : '–'), h('td', {}, run.worst
        ? run.worst.name + ' (' + run.worst.metric + ' ' + fmt(run.worst.value) + ')' : '–'),
      finals.map((name) => {
        const values = num(RUNS.map((r) => own(r.final, name))), mine = values[i];
        const goal = goalOf(run, name), real = values.filter((v) => v !== null);
        const top = goal && real.length > 1 && mine === (goal === 'max' ? Math.max(...real)
          : Math.min(...real));
        return h('td', {class: top ? 'n best' : 'n'}, fmt(own(run.final, name)));
      }));
  });
  const body = [section('runs', 'Runs', grid(['run', 'status', 'epochs', 'elapsed', 'best',
    'worst class', ...finals.map((name) => h('th', {class: 'n'}, 'final ' + name))], rows)),
  bases.length ? metricsSection() : null, paramsSection()];
  return [h('header', {}, h('h1', {}, RUNS.length + ' runs')), h('main', {}, menu(), body)];
};
document.getElementById('page').append(...(MANY ? comparePage() : onePage()).flat()
  .filter(Boolean));
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
  for (const f of theme) f();
  redraw();
});
// While the run is open, its file is written again and again: look at it anew, but not while a
// person zooms, types or has gone elsewhere.
if (!MANY && RUN.status === 'running') setInterval(() => {
  const typing = document.activeElement && document.activeElement.tagName === 'INPUT';
  if (!document.hidden && !zoomed && !typing && !viewer.open && !String(getSelection())) {
    location.reload();
  }
}, RELOAD_MS);
document.body.dataset.ready = '1';
})();
"""
