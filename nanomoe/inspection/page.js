'use strict';
const {about, figures} = JSON.parse(document.getElementById('data').textContent);
const some = Object.values(figures)[0];
const state = {layer: 0, kind: null, token: -1, experts: new Set()};
const draws = [];

// Elements -------------------------------------------------------------------

// Returns an element; texts become text nodes, never markup.
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === 'on') Object.entries(value).forEach(x => element.addEventListener(...x));
    else if (name === 'style') Object.entries(value).forEach(x => element.style.setProperty(...x));
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter(x => x !== null));
  return element;
}
const percent = (x, digits = 0) => x === null ? '–' : `${(100 * x).toFixed(digits)} %`;
const count = x => x.toLocaleString('en');
const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? '' : 's'}`;
const visible = text => text
  .replace(/ /g, '␣').replace(/\n/g, '⏎').replace(/\t/g, '⇥').replace(/\r/g, '␍');
const layerName = i => `layer ${some.layers[i]}`;
const experts = () => some.experts[state.layer];

// Distinct hues for a few experts, the golden angle for many.
const HUES = [212, 28, 145, 330, 268, 50, 184, 0];
const hue = e => about.num_experts <= HUES.length ? HUES[e] : (e * 137.508) % 360;
// Experts with similar hues differ in lightness.
const tone = e => about.num_experts <= HUES.length ? 0 : [0, -14, 9][Math.floor(e / 8) % 3];
const paint = e => ({'--h': hue(e), '--t': `${tone(e)}%`});
const swatch = e => h('span', {class: 'swatch', style: paint(e), 'aria-hidden': 'true'});

function source(figure, layer = true) {
  const tokens = plural(figure.num_tokens, 'token');
  const where = layer ? layerName(state.layer) : `layers ${some.layers.join(', ')}`;
  return h('p', {class: 'source'},
    `${where[0].toUpperCase()}${where.slice(1)} · ${figure.split} · ${tokens}`);
}

// Makes a section that is drawn again when the layer changes.
function section(id, title, note, draw) {
  const body = h('div');
  const element = h('section', {id, 'aria-labelledby': `${id}-title`},
    h('h2', {id: `${id}-title`}, title), body);
  draws.push(() => body.replaceChildren(...draw().flat().filter(Boolean),
    ...(note ? [h('details', null, h('summary', null, 'How to read this'), h('p', {class: 'soft'}, note))] : [])));
  return element;
}

// Shows a description of the cell under the pointer or the arrow keys. Calls
// `selected` with its index.
function inspectable(container, cells, columns, describe, detail, selected = () => {}) {
  let current = -1;
  const index = new Map(cells.map((cell, i) => [cell, i]));
  function select(i, scroll) {
    if (i < 0 || i >= cells.length) return;
    if (current >= 0) cells[current].classList.remove('current');
    current = i;
    cells[i].classList.add('current');
    detail.textContent = describe(i);
    selected(i);
    if (scroll) cells[i].scrollIntoView({block: 'nearest', inline: 'nearest'});
  }
  const over = event => {
    let cell = event.target;
    while (cell !== container && !index.has(cell)) cell = cell.parentElement;
    if (index.has(cell)) select(index.get(cell), false);
  };
  container.addEventListener('pointerover', over);
  container.addEventListener('click', over);
  container.tabIndex = 0;
  container.addEventListener('keydown', event => {
    const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[event.key];
    if (!step) return;
    event.preventDefault();
    select(current < 0 ? 0 : current + step, true);
  });
  return select;
}
const detailLine = hint => h('p', {class: 'detail', 'aria-live': 'polite'}, hint);

// Color of a lift: orange above 1, blue below, full at the factor FULL.
const FULL = about.num_experts > 8 ? 16 : about.num_experts > 4 ? 8 : 4;
function color(lift) {
  if (lift === null) return 'transparent';
  const x = Math.log2(Math.max(1 / FULL, Math.min(FULL, lift))) / Math.log2(FULL);
  return `rgb(var(--${x > 0 ? 'more' : 'less'}) / ${((x > 0 ? .8 : .45) * Math.abs(x)).toFixed(3)})`;
}
const shownLift = x => x === null ? '–' : x >= 9.95 ? x.toFixed(0) : x.toFixed(1);
const scale = () => h('div', {class: 'scale'}, `1/${FULL} of chance or less`,
  h('span', {class: 'ramp'}), `${FULL} times chance or more`);

// A table of lifts, with a row for each label and a column for each expert.
function heat({corner, rows, columns, lift, weak, describe, mono}) {
  const cells = [];
  const body = rows.map((row, r) => h('tr', null,
    h('th', {scope: 'row', class: mono ? 'mono' : null, title: row}, row),
    columns.map((_, c) => {
      const value = lift(r, c);
      const cell = h('td', {
        class: weak(r, c) ? 'weak' : null,
        // A dense table shows no numbers.
        style: {background: color(columns.length > 16 && weak(r, c) ? null : value)},
      }, shownLift(value));
      cells.push(cell);
      return cell;
    })));
  const detail = detailLine('Point at a cell, tap it, or use the arrow keys.');
  const box = h('div', {class: 'scroll', role: 'group', 'aria-label': `${corner}: lifts`},
    h('table', {class: columns.length > 16 ? 'heat dense' : 'heat'},
      h('thead', null, h('tr', null, h('th', {scope: 'col'}, corner),
        columns.map(e => h('th', {scope: 'col'}, String(e))))),
      h('tbody', null, body)));
  inspectable(box, cells, columns.length,
    i => describe(Math.floor(i / columns.length), i % columns.length), detail);
  return [box, detail];
}

// Bars from 0 to `whole`, each with a mark and the expert of its color.
function meter(rows, whole = 1) {
  return h('div', {class: 'meter'}, rows.flatMap(([name, value, mark, own]) => [
    h('span', null, name),
    h('div', {class: 'track'},
      h('div', {class: 'fill', style: {
        width: `${100 * (value ?? 0) / whole}%`,
        ...(own === undefined ? {} : {...paint(own), background: 'var(--solid)'}),
      }}),
      mark === null ? null : h('div', {class: 'mark', style: {left: `${100 * mark / whole}%`}})),
    h('output', null, percent(value, 1)),
  ]));
}

// Figures --------------------------------------------------------------------

function loads() {
  const f = figures.loads, l = state.layer;
  const fair = 1 / about.num_experts;
  return [source(f),
    h('p', null,
      `${plural(f.num_choices[l], 'choice')}; ${percent(f.without_expert[l], 1)} of the tokens have no expert; ` +
      `${percent(f.dropped[l], 1)} of the choices were dropped.`),
    h('div', {class: 'long', tabindex: experts().length > 12 ? 0 : null},
      meter(experts().map((e, i) => [
        h('span', {class: 'name'}, swatch(e), `Expert ${e}`), f.share[l][i], fair, e,
      ]), Math.max(...f.share[l], 2 * fair))),
  ];
}

function colored() {
  const f = figures.text, l = state.layer;
  const bits = new Map(f.dropped[l]);
  const isDropped = (t, c) => ((bits.get(t) ?? 0) >> c) & 1;
  const starts = [];
  f.texts.reduce((at, text) => (starts.push(at), at + text.num_tokens), 0);
  const spans = [], parts = [];
  f.pieces.forEach((piece, t) => {
    const at = starts.indexOf(t);
    if (at >= 0 && f.texts.length > 1) parts.push(h('b', null, f.texts[at].name));
    const first = f.choices[l][t][0];
    const is_none = first === f.no_expert;
    const span = document.createElement('span');
    span.className = is_none ? 'none' : 'on';
    if (isDropped(t, 0)) span.classList.add('dropped');
    if (!is_none) Object.entries(paint(first)).forEach(x => span.style.setProperty(...x));
    piece.split(/(\n)/).forEach(part => {
      if (part === '\n') span.append(h('i', null, '⏎'), '\n');
      else span.append(part);
    });
    span.expert = first;
    spans.push(span);
    parts.push(span);
  });
  const detail = detailLine('Point at a token, tap it, or use the arrow keys.');
  const box = h('div', {class: 'text', role: 'group', 'aria-label': 'Text colored by expert'}, parts);
  const select = inspectable(box, spans, 40, t => {
    const more = f.num_choices ? f.num_choices[l][t] - f.choices[l][t].filter(e => e !== f.no_expert).length : 0;
    const chosen = f.choices[l][t].map((e, c) => e === f.no_expert ? null
      : `expert ${e} with weight ${(f.percent[l][t][c] / 100).toFixed(2)}${isDropped(t, c) ? ' (dropped)' : ''}`)
      .filter(Boolean).concat(more ? `and ${more} more` : []);
    return `“${visible(f.pieces[t])}” at position ${f.positions[t]} · ${chosen.join(', ') || 'no expert'}`;
  }, detail, t => { state.token = t; });
  select(state.token, false);
  // A layer may not show an expert of the layer before.
  state.experts = new Set(experts().filter(e => state.experts.has(e)));
  const fade = () => spans.forEach(span => span.classList.toggle('off',
    state.experts.size > 0 && !state.experts.has(span.expert)));
  const legend = h('div', {class: 'legend', role: 'group', 'aria-label': 'Experts to highlight'},
    experts().map((e, i) => h('button', {
      type: 'button', 'aria-pressed': String(state.experts.has(e)),
      on: {click: event => {
        if (!state.experts.delete(e)) state.experts.add(e);
        event.currentTarget.setAttribute('aria-pressed', String(state.experts.has(e)));
        fade();
      }},
    }, swatch(e), `Expert ${e}`, h('span', {class: 'soft'}, percent(figures.loads.share[l][i])))));
  fade();
  return [source(f), legend, box, detail];
}

const KINDS = {token: 'Token', class: 'Token class', position: 'Position', speaker: 'Speaker', text: 'Text'};
const kinds = Object.keys(KINDS).filter(kind => figures[`specialization_${kind}`]);
state.kind = kinds[0];

function specialization() {
  const tabs = h('div', {class: 'tabs', role: 'tablist', 'aria-label': 'Labels'});
  const panel = h('div', {role: 'tabpanel', id: 'panel'});
  function show(kind, focus) {
    state.kind = kind;
    tabs.replaceChildren(...kinds.map(k => h('button', {
      type: 'button', role: 'tab', id: `tab-${k}`, 'aria-controls': 'panel',
      'aria-selected': String(k === kind), tabindex: k === kind ? 0 : -1,
      on: {
        click: () => show(k, true),
        keydown: event => {
          const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
          if (step) show(kinds[(kinds.indexOf(k) + step + kinds.length) % kinds.length], true);
        },
      },
    }, KINDS[k])));
    panel.setAttribute('aria-labelledby', `tab-${kind}`);
    panel.replaceChildren(...lifts(kind));
    if (focus) tabs.querySelector('[aria-selected=true]').focus();
  }
  show(state.kind);
  return [tabs, panel];
}

function lifts(kind) {
  const f = figures[`specialization_${kind}`], l = state.layer;
  const of = (name, r, c) => f[name][l][c][r];
  const is_weak = (r, c) => {
    const x = of('lift', r, c);
    return x === null || (x >= of('null_low', r, c) && x <= of('null_high', r, c));
  };
  const names = kind === 'token' ? f.labels.map((x, i) =>
    i === f.labels.length - 1 && x === 'other' ? x : visible(x)) : f.labels;
  const range = (low, high) => low === null ? 'unknown' : `${low.toFixed(2)} to ${high.toFixed(2)}`;
  return [source(f),
    h('p', null, `Mutual information ${f.information[l].toFixed(3)} bits; ` +
      `${f.null_information[l].toFixed(3)} bits after permutation of the labels (p ${f.p_value[l] * (f.num_permutations + 1) < 1.5 ? '≤' : '='} ${f.p_value[l].toFixed(3)}).`),
    scale(),
    ...heat({
      corner: `${KINDS[kind]} \\ expert`, rows: names, columns: experts(), mono: kind === 'token',
      lift: (r, c) => of('lift', r, c), weak: is_weak,
      describe: (r, c) => `${names[r]} and expert ${experts()[c]}: lift ${of('lift', r, c)?.toFixed(2) ?? 'undefined'}, ` +
        `95 % interval ${range(of('low', r, c), of('high', r, c))}; ` +
        `${range(of('null_low', r, c), of('null_high', r, c))} with permuted labels; ` +
        `${plural(of('counts', r, c), 'choice')}, ${plural(f.label_tokens[r], 'token')} with the label.`,
    })];
}

function pairs(title, corner, matrix, rows, columns, sentence) {
  return [h('h3', null, title), ...heat({
    corner, rows: rows.map(e => `Expert ${e}`), columns,
    lift: (r, c) => matrix.lift[r][c], weak: () => false,
    describe: (r, c) => `${sentence(rows[r], columns[c])}: lift ${matrix.lift[r][c]?.toFixed(2) ?? 'undefined'}, ` +
      `${plural(matrix.counts[r][c], 'token')}.`,
  })];
}

function coactivation() {
  const f = figures.coactivation, l = state.layer;
  const before = f.previous[l];
  return [source(f), scale(),
    ...(f.of_token ? pairs('Experts of the same token', 'Expert \\ expert', f.of_token[l],
      experts(), experts(), (a, b) => `Experts ${a} and ${b} of one token`)
      : [h('p', null, 'Each token has one expert: no two experts meet in a token.')]),
    ...(before ? pairs(`First choices in layer ${before.layer} and here`,
      `Layer ${before.layer} \\ ${some.layers[l]}`, f.across_layers[l], before.experts, experts(),
      (a, b) => `Expert ${a} in layer ${before.layer}, then expert ${b}`)
      : [h('p', {class: 'soft'}, 'This is the first layer of experts: it has no layer before.')]),
  ];
}

function predictability() {
  const f = figures.predictability;
  const l = state.layer;
  const rows = [['Token', f.token], ['Position', f.position], ['Layer before', f.previous]];
  return [source(f),
    h('p', null, `Accuracy on ${plural(f.num_held_out[l], 'held-out token')}. The mark is the accuracy of the most frequent expert, ${percent(f.base[l], 1)}.`),
    meter(rows.filter(([, x]) => x[l] !== null).map(([name, x]) => [name, x[l], f.base[l]])),
    h('h3', null, 'All layers'),
    h('div', {class: 'scroll', tabindex: 0, role: 'group', 'aria-label': 'All layers'}, h('table', null,
      h('thead', null, h('tr', null, ['Layer', 'Most frequent', ...rows.map(([name]) => name)].map(x => h('th', {scope: 'col'}, x)))),
      h('tbody', null, some.layers.map((layer, i) => h('tr', null, h('th', {scope: 'row'}, String(layer)),
        [f.base, ...rows.map(([, x]) => x)].map(x => h('td', null, percent(x[i], 1)))))))),
  ];
}

function saturation() {
  const f = figures.saturation, l = state.layer;
  if (!f) return [h('p', null, 'There is no earlier checkpoint. With checkpoint.keep_latest=10, for example, a run keeps more of them.')];
  return [source(f),
    h('p', null, `Share of the choices of step ${count(f.final_step)} that an earlier checkpoint makes too. The mark is the overlap by chance.`),
    meter(f.steps.map((step, i) => [`Step ${count(step)}`, f.overlap[i][l], f.chance[i][l]])),
  ];
}

function loadHistory() {
  const f = figures.load_history, l = state.layer;
  const axis = h('div', {class: 'axis'},
    ...[0, Math.floor((f.steps.length - 1) / 2), f.steps.length - 1]
      .filter((x, i, all) => all.indexOf(x) === i).map(i => h('span', null, `step ${count(f.steps[i])}`)));
  const detail = detailLine('Point at a step, tap it, or use the arrow keys.');
  const group = {role: 'group', 'aria-label': 'Loads over time'};
  const columns = f.share[l];
  if (experts().length <= 16) {
    const cells = columns.map(column => h('div', null,
      experts().map((e, j) => h('span', {style: {...paint(e), flex: String(column[j] ?? 0)}}))));
    const box = h('div', {class: 'history', ...group}, cells);
    inspectable(box, cells, cells.length, i => `Step ${count(f.steps[i])}: ` +
      experts().map((e, j) => `expert ${e} ${percent(columns[i][j])}`).join(', '), detail);
    return [source(f),
      h('p', null, 'Each column is a period of training; the height of a color is the load of its expert.'),
      box, axis, detail,
      h('div', {class: 'scale'}, experts().flatMap(e => [swatch(e), `Expert ${e}`]))];
  }
  const cells = [];
  const rows = experts().flatMap((e, j) => [h('span', null, String(e)),
    h('div', null, columns.map(column => {
      const cell = h('span', {style: {background: color(column[j] === null ? null : column[j] * about.num_experts)}});
      cells.push(cell);
      return cell;
    }))]);
  const box = h('div', {class: 'strips', ...group}, rows);
  inspectable(box, cells, columns.length, i => {
    const j = Math.floor(i / columns.length), c = i % columns.length;
    return `Expert ${experts()[j]} at step ${count(f.steps[c])}: ${percent(columns[c][j], 1)}`;
  }, detail);
  return [source(f), h('p', null, 'Each row is an expert; the color is its load relative to a balanced one.'), scale(),
    box, axis, detail];
}

function contextsOf() {
  const f = figures.contexts, l = state.layer;
  return [source(f), h('div', {class: 'grid'}, experts().map((e, i) => h('div', {class: 'expert', style: paint(e)},
    h('h3', null, swatch(e), `Expert ${e}`),
    f.contexts[l][i].length ? h('ol', {class: 'mono'}, f.contexts[l][i].map(c => h('li', null,
      h('span', null, c.before.replace(/\n/g, '⏎'), h('mark', null, visible(c.token) || '□'), c.after.replace(/\n/g, '⏎')),
      h('small', null, c.weight.toFixed(2)))))
      : h('p', {class: 'soft'}, 'No token chose this expert.'))))];
}

// Page -----------------------------------------------------------------------

const hidden = about.layers.length > some.layers.length;
const cut = Math.max(...some.experts.map(x => x.length)) < about.num_experts;
const texts = about.texts.map(t => `${t.name} (${plural(t.num_tokens, 'token')})`).join(', ');
document.title = `Routing of ${about.workdir}, step ${about.step}`;

const SECTIONS = [
  ['text', 'Text', 'Text by expert', 'The color of a token is its first expert. A token without an expert is underlined with dots; a choice that found no room in its expert is struck through. The buttons highlight experts.', colored],
  ['loads', 'Loads', 'Loads', 'The bar is the share of all choices, and the mark is a balanced load.', loads],
  ['specialization', 'Specialization', 'Specialization', 'A cell is the lift P(expert | label) / P(expert). Gray numbers, and cells without a color in tables of many experts, lie within the middle 95 % of the lifts after permutations of the labels: of tokens, of whole speeches, or of whole windows for texts. Positions are rotated within each window. The interval of a lift is a bootstrap over at least 8 windows. Each cell is tested by itself, so a few of many cells stand out by chance; the p-value is for the layer.', specialization],
  ['coactivation', 'Co-activation', 'Co-activation', 'A cell is the number of tokens with both experts over the number that random pairs with the same loads would give.', coactivation],
  ['predictability', 'Predictability', 'Predictability of the first choice', 'Every second window of each text is counted: the most frequent first choice for each token, position or expert of the layer before. The other windows are predicted. A high accuracy from the token alone means that the layer routes by vocabulary (Xue et al. 2024, OpenMoE).', predictability],
  ['saturation', 'Saturation', 'Router saturation', 'Muennighoff et al. 2024 (OLMoE), sec. 5.1, over the checkpoints that still exist. The overlap by chance has the same loads, for tokens exchanged at random.', saturation],
  ['load_history', 'Over time', 'Loads over time', null, loadHistory],
  ['contexts', 'Contexts', 'Contexts that activate an expert most', 'The tokens with the highest weights. Equal tokens after equal characters are shown once.', contextsOf],
].filter(([id]) => id === 'specialization' ? kinds.length : id === 'saturation' || figures[id]);

const select = h('select', {id: 'layer', on: {change: event => {
  state.layer = Number(event.target.value);
  redraw();
}}}, some.layers.map((layer, i) => h('option', {value: i}, String(layer))));

document.body.append(
  h('header', null,
    h('h1', null, 'Which experts do tokens choose?'),
    h('p', {class: 'facts'}, `${about.workdir}, step ${count(about.step)}${about.is_running ? ' (in progress)' : ''}: ` +
      `router ${about.router}, ${about.num_experts} experts, top ${about.top_k}, ${plural(about.layers.length, 'layer')} of experts, tokenizer ${about.tokenizer}.`),
    h('p', {class: 'soft facts'}, `Text: ${texts}, in windows of ${about.block_size}.`),
    hidden ? h('p', {class: 'soft'}, `Shown are ${some.layers.length} of the ${about.layers.length} layers of experts: ${some.layers.join(', ')}.`) : null,
    cut ? h('p', {class: 'soft'}, `Shown are the ${some.experts[0].length} experts of each layer with the highest loads.`) : null),
  h('div', {class: 'bar'}, h('div', null,
    h('label', {for: 'layer'}, 'Layer', select),
    h('nav', {'aria-label': 'Figures'}, SECTIONS.map(([id, name]) => h('a', {href: `#${id}`}, name))))),
  h('main', null, SECTIONS.map(([id, , title, note, draw]) => section(id, title, note, draw)),
    h('footer', null, `Written by NanoMoE ${about.nanomoe}. The same figures are in the JSON file beside this page.`)));

// Another layer leaves the reader at the same place of the page and the text.
function redraw() {
  const top = document.querySelector('.text')?.scrollTop ?? 0;
  const open = [...document.querySelectorAll('details')].map(x => x.open);
  draws.forEach(draw => draw());
  document.querySelectorAll('details').forEach((x, i) => { x.open = open[i] ?? false; });
  document.querySelector('.text').scrollTop = top;
}
redraw();
