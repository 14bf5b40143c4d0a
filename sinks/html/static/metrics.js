// Metrics of the runs over epochs, steps or time, and an overview of a run.

// Metrics ---------------------------------------------------------------------------------------
const label = (run) => {
  const name = run.about.name || run.run;
  const twin = RUNS.some((other) => other !== run && (other.about.name || other.run) === name);
  return twin ? name + ' (' + run.run + ')' : name;
};
const between = (value, from, to) => {  // linear; beyond the ends with the last slope
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
const drawn = (series) => {  // a thinned series shows its lowest and highest value too
  let {x, y, t} = series;
  for (const end of [series.low, series.high]) {
    if (series.stride < 2 || !end || x.includes(end[1])) continue;
    const after = x.findIndex((v) => v > end[1]), i = after < 0 ? x.length : after;
    const put = (list, value) => [...list.slice(0, i), value, ...list.slice(i)];
    t = put(t, between(end[1], x, t));
    [x, y] = [put(x, end[1]), put(y, end[0])];
  }
  return {...series, x, y, t};
};
const thinnedText = (base) => groups.get(base).filter(([, s]) => s.stride > 1).map(([run, s]) =>
  (MANY ? label(run) + ' ' : '') + s.phase + ': one of ' + s.stride + ' values is drawn, and ' +
    'the lowest and the highest').join(', ');
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
  // As `RunStarted.goal_of`: an exact name, else the longest `prefix*`; brackets are no pattern.
  if (Object.hasOwn(run.goals, name)) return run.goals[name];
  const fits = Object.keys(run.goals).filter((g) => g.endsWith('*')
    && name.startsWith(g.slice(0, -1))).sort((a, b) => b.length - a.length);
  return fits.length ? run.goals[fits[0]] : null;
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
  groups.get(base).forEach(([run, all], index) => {
    const series = drawn(all);
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
    const odd = oddText(base), thinned = thinnedText(base);
    const card = h('div', {class: 'card metric', 'data-base': base}, h('h3', {}, base),
      chartOf(() => metricTraces(base), {'data-kind': 'metric'}),
      thinned && h('div', {class: 'small soft wrap'}, thinned),
      odd && h('div', {class: 'small warning wrap'}, odd));
    card.words = (base + ' ' + groups.get(base).map(([, s]) => s.name).join(' ')).toLowerCase();
    return card;
  });
  const none = h('p', {class: 'soft', hidden: true}, 'No chart matches.');
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
      quiet > 60 ? 'last record ' + took(quiet) + ' ago' : ''),
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
