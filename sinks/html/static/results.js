// Results of a run: curves, matrices, histograms, tables, pictures, texts.

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
