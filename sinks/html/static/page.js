// Parameters, and the page of one run or of several.

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
    : 'No parameter matches.');
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
// While the run is open, its file is rewritten: reload it, unless a person zooms, types or looks
// elsewhere.
if (!MANY && RUN.status === 'running') setInterval(() => {
  const typing = document.activeElement && document.activeElement.tagName === 'INPUT';
  if (!document.hidden && !zoomed && !typing && !viewer.open && !String(getSelection())) {
    location.reload();
  }
}, RELOAD_MS);
document.body.dataset.ready = '1';
