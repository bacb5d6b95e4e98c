// Draws maps of one image for one or two models and a VFM, and lets layer, patch, token and head be chosen.
// Everything is drawn from `data` (workbench/dashboard/viewer.py); the server is told what is chosen once it rests.
const VIRIDIS = ['440154', '482878', '3e4a89', '31688e', '26828e', '1f9e89', '35b779', '6ece58', 'b5de2b', 'fde725']
  .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const REST = 350; // ms after which the server is told
const remembered = new WeakMap();

const unpack = (text, Type) => new Type(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const times = (ratio) => ratio.toFixed(1) + ' times';
const percent = (p, digits = 1) => (100 * p).toFixed(100 * p < 1 && p > 0 ? 2 : digits) + ' %';
const element = (tag, attributes = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
};

function color(share) {
  const at = Math.min(1, Math.max(0, share)) * (VIRIDIS.length - 1);
  const low = Math.min(VIRIDIS.length - 2, Math.floor(at));
  return VIRIDIS[low].map((value, i) => value + (at - low) * (VIRIDIS[low + 1][i] - value));
}

function decoded(panel) {
  const one = { ...panel, tokens: panel.x.length * panel.y.length };
  if (panel.attention) one.attention = { at: panel.attention.at, v: unpack(panel.attention.v, Float32Array) };
  if (panel.mass) one.mass = unpack(panel.mass, Float32Array);
  if (panel.cosine) one.cosine = { at: panel.cosine.at, v: unpack(panel.cosine.v, Float32Array) };
  if (panel.pca) one.pca = unpack(panel.pca, Uint8Array);
  if (panel.words) {
    const { ids, p, special } = panel.words;
    one.words = { ...panel.words, ids: unpack(ids, Int32Array), p: unpack(p, Float32Array), special: new Set(special) };
  }
  return one;
}

// --- what is chosen -------------------------------------------------------------------------------

function started(data, models) {
  const { start } = data;
  const complaints = [];
  const last = Math.max(...models.map((m) => m.layers)) - 1;
  const first = models[0];
  const heads = Math.max(...models.map((m) => m.heads));
  const rows = Math.max(...models.map((m) => m.rows.length));
  const whole = (key, words, high, otherwise, said = (v) => v) => {
    if (start[key] === undefined) return otherwise;
    const value = /^\d+$/.test(start[key]) ? Number(start[key]) : -1;
    if (value >= 0 && value <= high) return value;
    complaints.push(`The link names ${words} ${start[key]}, which is not here; shown is ${said(otherwise)}.`);
    return otherwise;
  };
  const state = {
    show: start.show in data.views ? start.show : 'attention',
    l: whole('l', 'layer', last, Math.min(data.layer, last)),
    t: whole('t', 'token', rows - 1, 0, () => 'the end of the question'),
    h: start.h === undefined || start.h === 'mean' ? 'mean' : whole('h', 'head', heads - 1, 'mean', () => 'the mean of heads'),
    p: [Math.floor(first.y.length / 2), Math.floor(first.x.length / 2)],
    opacity: 0.65,
  };
  if (start.show !== undefined && !(start.show in data.views)) {
    complaints.push(`The link names the view ${start.show}, which is not here; shown is ${data.views.attention}.`);
  }
  state.p = [...state.p, ...state.p];
  if (start.p !== undefined) {
    const match = /^(\d+),(\d+)(?:-(\d+),(\d+))?$/.exec(start.p);
    const place = match ? match.slice(1).map((v) => (v === undefined ? undefined : Number(v))) : [];
    const wanted = match ? [place[0], place[1], place[2] ?? place[0], place[3] ?? place[1]] : [];
    if (match && [0, 2].every((i) => wanted[i] < first.y.length && wanted[i + 1] < first.x.length)) state.p = wanted;
    else complaints.push(`The link names patch ${start.p}, which is not here; shown is ${state.p.slice(0, 2)}.`);
  }
  return { state, complaints };
}

function clamped(state, models) {
  const [first] = models;
  state.l = Math.min(state.l, Math.max(...models.map((m) => m.layers)) - 1);
  state.t = Math.min(state.t, Math.max(...models.map((m) => m.rows.length)) - 1);
  if (state.h !== 'mean' && state.h >= Math.max(...models.map((m) => m.heads))) state.h = 'mean';
  state.p = state.p.map((v, i) => Math.min(v, (i % 2 ? first.x : first.y).length - 1));
}

const address = ({ show, l, p, t, h }) => ({
  show, l: String(l), t: String(t), h: String(h),
  p: p[0] === p[2] && p[1] === p[3] ? `${p[0]},${p[1]}` : `${p[0]},${p[1]}-${p[2]},${p[3]}`,
});

// the chosen region in fractions of the image: the patches of the first model
function region(first, [r1, c1, r2, c2]) {
  const [top, bottom] = [Math.min(r1, r2), Math.max(r1, r2)];
  const [left, right] = [Math.min(c1, c2), Math.max(c1, c2)];
  return [first.x[left][0], first.y[top][0], first.x[right][1], first.y[bottom][1]];
}

const center = ([low, high]) => (low + high) / 2;

function nearest(panel, x, y) {
  const place = (edges, value) => edges.reduce(
    (best, edge, i) => (Math.abs(center(edge) - value) < Math.abs(center(edges[best]) - value) ? i : best), 0);
  return place(panel.y, y) * panel.x.length + place(panel.x, x);
}

function within(panel, box) {
  const chosen = [];
  panel.y.forEach((row, r) => panel.x.forEach((column, c) => {
    const [x, y] = [center(column), center(row)];
    if (x >= box[0] && x < box[2] && y >= box[1] && y < box[3]) chosen.push(r * panel.x.length + c);
  }));
  return chosen;
}

// --- values of the maps ---------------------------------------------------------------------------

function attentionOf(panel, state, row) {
  const block = state.l - 1;
  const at = panel.attention.at;
  if (block < 0 || state.l >= panel.layers || row >= panel.rows.length || (at !== null && at !== row)) return null;
  const base = ((at === null ? row : 0) * (panel.layers - 1) + block) * panel.heads;
  const heads = state.h === 'mean' ? [...Array(panel.heads).keys()] : [state.h];
  const values = new Float64Array(panel.tokens);
  for (const head of heads) {
    if (head >= panel.heads) return null;
    for (let n = 0; n < panel.tokens; n += 1) values[n] += panel.attention.v[(base + head) * panel.tokens + n] / heads.length;
  }
  let mass = 0;
  for (const head of heads) mass += panel.mass[(row * (panel.layers - 1) + block) * panel.heads + head] / heads.length;
  return { values, mass };
}

function similarityOf(panel, state, patch) {
  const layer = panel.vfm ? 0 : state.l;
  if (!panel.cosine || layer >= panel.layers || (panel.cosine.at !== null && panel.cosine.at !== patch)) return null;
  const base = ((panel.cosine.at === null ? patch : 0) * panel.layers + layer) * panel.tokens;
  return { values: panel.cosine.v.subarray(base, base + panel.tokens), alike: panel.alike[layer] };
}

function wordsOf(panel, layer, token) {
  const { ids, p, most, texts, special } = panel.words;
  const base = (layer * panel.tokens + token) * most;
  return Array.from({ length: most }, (_, k) => ({
    text: texts[ids[base + k]], p: p[base + k], special: special.has(ids[base + k]),
  }));
}

function mapOf(panel, state, patch, row) {
  if (panel.plain) return null;
  if (state.show === 'attention') return panel.vfm ? null : attentionOf(panel, state, row);
  if (state.show === 'similarity') return similarityOf(panel, state, patch);
  if (state.show === 'words') {
    if (!panel.words || state.l >= panel.layers) return null;
    const best = Array.from({ length: panel.tokens }, (_, n) => wordsOf(panel, state.l, n)[0]);
    return { values: best.map((word) => word.p), texts: best };
  }
  const layer = panel.vfm ? 0 : state.l;
  return panel.pca && layer < panel.layers ? { rgb: panel.pca, base: layer * panel.tokens * 3 } : null;
}

// --- the page -------------------------------------------------------------------------------------

export default function viewer({ data, parentElement, setStateValue }) {
  const models = data.panels.map(decoded);
  const vfm = data.vfm ? decoded(data.vfm) : null;
  const first = models[0];
  let memory = remembered.get(parentElement);
  if (!memory) {
    memory = started(data, models);
    remembered.set(parentElement, memory);
  } else clamped(memory.state, models);
  const { state, complaints } = memory;
  const lastLayer = Math.max(...models.map((m) => m.layers)) - 1;
  const image = new Image();
  let timer = 0;
  let drag = null;

  parentElement.querySelector('.viewer')?.remove();
  const root = element('div', { className: 'viewer' });
  parentElement.append(root);
  if (complaints.length) {
    const box = element('div', { className: 'complaint' }, complaints.join(' ') + ' ');
    const button = element('button', { type: 'button', textContent: 'Dismiss', onclick: () => { complaints.length = 0; box.remove(); } });
    box.append(button);
    root.append(box);
  }

  const change = (more) => {
    Object.assign(state, more);
    draw();
    clearTimeout(timer);
    timer = setTimeout(() => setStateValue('chosen', address(state)), REST);
  };

  // controls
  const views = Object.entries(data.views).map(([key, label]) =>
    element('button', { type: 'button', textContent: label, onclick: () => change({ show: key }), value: key }));
  const layerText = element('span');
  const layer = element('input', { type: 'range', min: 0, max: lastLayer, step: 1, value: state.l, oninput: () => change({ l: Number(layer.value) }) });
  layer.setAttribute('aria-label', 'Layer');
  const head = element('select', { onchange: () => change({ h: head.value === 'mean' ? 'mean' : Number(head.value) }) },
    element('option', { value: 'mean', textContent: 'mean of heads' }),
    ...Array.from({ length: Math.max(...models.map((m) => m.heads)) }, (_, n) => element('option', { value: n, textContent: `head ${n}` })));
  const headBox = element('label', {}, element('span', { textContent: 'Head' }), head);
  const opacity = element('input', { type: 'range', min: 0, max: 1, step: 0.05, value: state.opacity, oninput: () => { state.opacity = Number(opacity.value); draw(); } });
  root.append(
    element('div', { className: 'bar' }, element('div', { className: 'views' }, ...views)),
    element('div', { className: 'bar' },
      element('label', { className: 'layer' }, layerText, layer), headBox,
      element('label', {}, element('span', { textContent: 'Image ↔ map' }), opacity)),
  );
  root.querySelector('.views').style.flexDirection = 'row';
  const scale = element('canvas', { className: 'scale', width: 176, height: 10 });
  const [low, high, about] = [element('span'), element('span'), element('span')];
  // one button for each object that is asked about, which frames the patches that it covers
  const frames = data.objects.map((name, k) => {
    const covered = first.covered[k];
    const most = Math.max(...covered);
    const on = covered.map((v, n) => (v >= Math.min(0.5, most) && v > 0 ? n : -1)).filter((n) => n >= 0);
    const [rows, columns] = [on.map((n) => Math.floor(n / first.x.length)), on.map((n) => n % first.x.length)];
    const corners = [Math.min(...rows), Math.min(...columns), Math.max(...rows), Math.max(...columns)];
    const button = element('button', { type: 'button', textContent: `Frame ${name}`, onclick: () => change({ p: corners }) });
    return on.length ? [button] : [];
  }).flat();
  const scaleLine = element('div', { className: 'scale-line' }, low, scale, high, about);
  if (frames.length) root.append(element('div', { className: 'bar frames' }, ...frames));
  root.append(scaleLine);

  // panels
  const panels = element('div', { className: 'panels' });
  root.append(panels);
  const plain = { name: 'Image', plain: true, x: first.x, y: first.y, tokens: first.tokens };
  const drawn = [plain, ...models, ...(vfm ? [vfm] : [])].map((panel) => {
    const canvas = element('canvas', { className: 'map', tabIndex: 0 });
    canvas.setAttribute('role', 'img');
    const read = element('div', { className: 'read' });
    const dot = element('span', { className: 'dot' });
    dot.style.background = panel.color;
    dot.hidden = !panel.color;
    const answer = element('div', { className: 'answer' });
    const tokens = (panel.rows ?? []).map((row, t) => {
      const button = element('button', { type: 'button', textContent: row.text.trim() || row.text || '␣', onclick: () => change({ t, ...(state.show === 'attention' ? {} : { show: 'attention' }) }) });
      if (!t) button.className = 'end';
      button.title = t ? `p = ${row.p.toFixed(3)}; ` + row.likely.map(([word, p]) => `${word} ${p.toFixed(3)}`).join(', ')
        : 'Where the first token of the answer is decided';
      answer.append(button);
      return button;
    });
    const about = { plain: 'click a patch, drag a region', vfm: 'its patches under the same places' };
    for (const kind of ['plain', 'vfm']) if (panel[kind]) answer.append(element('span', { className: 'small', textContent: about[kind] }));
    if (panel.rows?.length === 1) answer.append(element('span', { className: 'small', textContent: '(empty answer)' }));
    const chips = element('div', { className: 'ranked small' });
    const heads = (panel.ranked ?? []).map((one) => {
      const button = element('button', {
        type: 'button', textContent: `L${one.layer} H${one.head} ${percent(one.share, 0)}`,
        onclick: () => change({ l: one.layer, h: one.head, show: 'attention' }),
      });
      button.title = `Layer ${one.layer}, head ${one.head} looks most at the object of ${percent(one.share)} `
        + `[${percent(one.low)}, ${percent(one.high)}] of ${one.questions} questions about ${one.images} images of ${one.data}, `
        + `at objects of other images in ${percent(one.others)}; p = ${one.p.toPrecision(2)} (Holm)`;
      return button;
    });
    if (heads.length) {
      const { images, data: of } = panel.ranked[0];
      const others = panel.ranked.map((one) => one.others);
      const [least, most] = [Math.min(...others), Math.max(...others)].map((p) => percent(p, 0));
      chips.append(element('span', { textContent: 'Heads that look at the object most:' }), ...heads,
        element('span', { className: 'chance', textContent: `Share of the questions about ${images} images of ${of} at whose object the head looks most; it was chosen on other images, the best first. Objects of other images: ${least === most ? least : `${least} to ${most}`}` }));
    }
    const box = element('div', { className: panel.plain ? 'panel plain' : 'panel' },
      element('div', { className: 'name' }, dot, panel.name), answer, canvas, chips, read);
    panels.append(box);
    listen(canvas);
    return { panel, box, canvas, read, tokens, chips, heads };
  });

  function patchAt(canvas, event) {
    const box = canvas.getBoundingClientRect();
    const token = nearest(first, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    return [Math.floor(token / first.x.length), token % first.x.length];
  }

  function listen(canvas) {
    canvas.onpointerdown = (event) => {
      if (event.button) return;
      drag = patchAt(canvas, event);
      if (event.pointerType !== 'touch') canvas.setPointerCapture(event.pointerId);
      change({ p: [...drag, ...drag] });
    };
    canvas.onpointermove = (event) => {
      if (!drag || event.pointerType === 'touch') return;
      const to = patchAt(canvas, event);
      if (to[0] !== state.p[2] || to[1] !== state.p[3]) change({ p: [...drag, ...to] });
    };
    canvas.onpointerup = canvas.onpointercancel = () => { drag = null; };
    canvas.onkeydown = (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const limit = (value, edges) => Math.min(edges.length - 1, Math.max(0, value));
      const to = [limit(state.p[2] + step[0], first.y), limit(state.p[3] + step[1], first.x)];
      change({ p: event.shiftKey ? [state.p[0], state.p[1], ...to] : [...to, ...to] });
    };
  }

  function paint({ panel, canvas }, values, bounds, box) {
    const width = Math.max(120, canvas.clientWidth) * Math.min(2, window.devicePixelRatio || 1);
    const height = (width * data.size[1]) / data.size[0];
    if (canvas.width !== Math.round(width) || canvas.height !== Math.round(height)) {
      [canvas.width, canvas.height] = [Math.round(width), Math.round(height)];
    }
    const to = canvas.getContext('2d');
    to.clearRect(0, 0, canvas.width, canvas.height);
    if (image.complete) to.drawImage(image, 0, 0, canvas.width, canvas.height);
    if (values) {
      panel.y.forEach(([top, bottom], r) => panel.x.forEach(([left, right], c) => {
        const n = r * panel.x.length + c;
        const share = values.rgb ? 1 : (values.values[n] - bounds[0]) / Math.max(1e-12, bounds[1] - bounds[0]);
        const rgb = values.rgb ? values.rgb.subarray(values.base + 3 * n, values.base + 3 * n + 3)
          : color(share);
        // low values let the image through, unless the map alone is wanted
        const alpha = Math.min(1, state.opacity > 0.95 ? 1 : state.opacity * (0.45 + 0.75 * share));
        to.fillStyle = `rgba(${Array.from(rgb, Math.round).join(',')},${alpha})`;
        const [x, y] = [Math.round(left * canvas.width), Math.round(top * canvas.height)];
        const [w, h] = [Math.round(right * canvas.width) - x, Math.round(bottom * canvas.height) - y];
        to.fillRect(x, y, w, h);
        if (values.texts && w > 30) {
          const word = values.texts[n];
          to.font = `${Math.max(9, Math.min(h / 3, w / 4.2))}px sans-serif`;
          to.textAlign = 'center';
          to.textBaseline = 'middle';
          to.lineWidth = 2;
          to.strokeStyle = '#000';
          to.fillStyle = word.special ? '#000b' : '#fff'; // what is no word stands back
          if (!word.special) to.strokeText(word.text, x + w / 2, y + h / 2, w - 2);
          to.fillText(word.text, x + w / 2, y + h / 2, w - 2);
        }
      }));
    }
    const edges = [box[0] * canvas.width, box[1] * canvas.height, (box[2] - box[0]) * canvas.width, (box[3] - box[1]) * canvas.height];
    for (const [line, style] of [[5, '#000'], [2, '#fff']]) {
      to.lineWidth = line;
      to.strokeStyle = style;
      to.strokeRect(...edges);
    }
  }

  function line(text, chance = '') {
    return element('div', {}, text, ...(chance ? [element('span', { className: 'chance', textContent: ` (${chance})` })] : []));
  }

  function wordTable(panel, patch) {
    const rows = [];
    for (let l = panel.layers - 1; l >= 0; l -= 1) {
      const [best] = wordsOf(panel, l, patch);
      const row = element('tr', l === state.l ? { className: 'here' } : {},
        element('td', { textContent: `layer ${l}` }),
        element('td', { textContent: best.text, className: best.special ? 'special' : '' }),
        element('td', { textContent: percent(best.p), className: 'number' }));
      rows.push(row);
    }
    return element('table', {}, ...rows);
  }

  function readings({ panel, read }, values, box, patch, row) {
    read.replaceChildren();
    if (panel.plain) {
      const span = (a, b) => (a === b ? `${a}` : `${Math.min(a, b)} to ${Math.max(a, b)}`);
      if (data.objects.length) read.append(line(`Asked about: ${data.objects.join(', ')}`));
      read.append(line(`Framed: row ${span(state.p[0], state.p[2])}, column ${span(state.p[1], state.p[3])}`, 'counted from 0'));
      return;
    }
    if (panel.vfm) {
      if (values?.alike !== undefined) read.append(line(`Cosine of two patches here: ${values.alike.toFixed(2)} on average`));
      if (state.show === 'pca') read.append(line('Another basis: compare shapes, not colors.'));
      return;
    }
    if (state.l >= panel.layers) { read.append(line(`No layer ${state.l}: the last one is ${panel.layers - 1}.`)); return; }
    if (state.show === 'attention') {
      if (row >= panel.rows.length) read.append(line('Its answer has no such token.'));
      else if (state.l === 0) read.append(line('Layer 0 is the projector, which has no attention.'));
      else if (state.h !== 'mean' && state.h >= panel.heads) read.append(line(`It has no head ${state.h}.`));
      else if (!values) read.append(line('…'));
      else {
        const equal = panel.uniform[row];
        const inside = within(panel, box);
        const sum = inside.reduce((total, n) => total + values.values[n], 0);
        read.append(
          line(`On the image: ${percent(values.mass)} of the attention`, `${percent(equal)} if all tokens got the same`),
          line(`In the frame: ${percent(sum)}`, `${percent((equal * inside.length) / panel.tokens)} if all got the same`));
        const all = values.values.reduce((total, v) => total + v, 0);
        data.objects.forEach((name, k) => {
          const covered = panel.covered[k];
          const on = values.values.reduce((total, v, n) => total + v * covered[n], 0);
          const area = covered.reduce((total, v) => total + v, 0) / panel.tokens;
          if (!(all > 0 && area > 0)) return;
          const elsewhere = panel.others.length
            ? values.values.reduce((total, v, n) => total + v * panel.others[n], 0) / all : null;
          read.append(line(`On ${name}: ${percent(on / all)} of that on the image`,
            `it covers ${percent(area)}, so ${times(on / all / area)} its share`
            + (elsewhere === null ? '' : `; objects of other images ${times(elsewhere)} theirs`)));
        });
        if (row) {
          const { text, p, likely } = panel.rows[row];
          const rest = likely.filter(([word]) => word.trim() !== text.trim()).slice(0, 3);
          read.append(line(`Token ${text.trim()}: ${percent(p)}`,
            rest.length ? `then ${rest.map(([word, share]) => `${word} ${percent(share)}`).join(', ')}` : ''));
        }
        if (panel.rows.length > 2) {
          const others = panel.rows.map((one, t) => [one.text.trim(), attentionOf(panel, state, t)]).filter(([, map]) => map);
          const shares = others.map(([text, map]) => `${text} ${percent(inside.reduce((total, n) => total + map.values[n], 0))}`);
          if (others.length > 1) read.append(line(`In the frame, by token: ${shares.join(' · ')}`));
        }
      }
    } else if (state.show === 'similarity') {
      if (!panel.cosine) read.append(line('A token is zero, so it has no direction to compare.'));
      else if (!values) read.append(line('…'));
      else {
        const most = [...values.values.keys()].filter((n) => n !== patch).sort((a, b) => values.values[b] - values.values[a]).slice(0, 3);
        const place = (n) => `row ${Math.floor(n / panel.x.length)}, column ${n % panel.x.length} (${values.values[n].toFixed(2)})`;
        read.append(line(`Cosine of two tokens here: ${values.alike.toFixed(2)} on average`, 'what a pair has by chance'),
          line(`Most similar to the framed patch: ${most.map(place).join(' · ')}`));
      }
    } else if (state.show === 'pca') {
      read.append(line(data.basis + '.'));
    } else if (!panel.words) {
      read.append(line(panel.whyNoWords || 'It has no logit lens.'));
    } else {
      const best = wordsOf(panel, state.l, patch);
      read.append(line('At the framed patch: ', `one of ${panel.words.vocabulary} words by chance: ${percent(1 / panel.words.vocabulary, 2)}`));
      const list = element('div');
      best.forEach((word, k) => list.append(...(k ? [' · '] : []),
        element('span', { textContent: `${word.text} ${percent(word.p)}`, className: word.special ? 'special' : '' })));
      read.append(list, wordTable(panel, patch));
    }
    if (panel.aligned) {
      const [score, chance] = [panel.aligned.s[state.l], panel.aligned.chance[state.l]];
      read.append(line(`CKNNA with ${data.vfm.name}, this image: ${score.toFixed(3)}`, `${chance.toFixed(3)} with permuted patches`));
      if (panel.spread) {
        const { low, high, below, images, data: of } = panel.spread;
        read.append(line(`Higher than ${percent(below[state.l], 0)} of ${images} images of ${of}`,
          `their middle 90 %: ${low[state.l].toFixed(3)} to ${high[state.l].toFixed(3)}`));
      }
    } else if (panel.why) read.append(line(`No CKNNA: ${panel.why}.`));
  }

  function draw() {
    clamped(state, models);
    views.forEach((button) => button.setAttribute('aria-pressed', String(button.value === state.show)));
    layer.value = state.l;
    layerText.textContent = `Layer ${state.l} of ${lastLayer}${state.l ? '' : ' (the projector)'}`;
    head.value = state.h;
    headBox.style.display = state.show === 'attention' ? '' : 'none';
    const box = region(first, state.p);
    const [x, y] = [center(first.x[state.p[1]]), center(first.y[state.p[0]])];
    const maps = drawn.map(({ panel }) => ({
      patch: nearest(panel, x, y), row: state.t, map: mapOf(panel, state, nearest(panel, x, y), state.t),
    }));
    const ranges = maps.filter(({ map }) => map && map.values).map(({ map }) => [Math.min(...map.values), Math.max(...map.values)]);
    const bounds = [
      state.show === 'similarity' ? Math.min(1, ...ranges.map((r) => r[0])) : 0,
      state.show === 'similarity' ? 1 : Math.max(1e-9, ...ranges.map((r) => r[1])),
    ];
    scaleLine.style.visibility = ranges.length ? 'visible' : 'hidden';
    const shown = (v) => (state.show === 'similarity' ? v.toFixed(2) : percent(v));
    [low.textContent, high.textContent] = bounds.map(shown);
    about.textContent = { attention: 'of the attention, for each patch; the same scale for both models',
      similarity: 'cosine with the framed patch (its first corner); the same scale everywhere',
      words: 'probability of the most likely word; the same scale for both models' }[state.show] ?? '';
    drawn.forEach((one, n) => {
      const { map, patch, row } = maps[n];
      one.box.style.display = one.panel.vfm && (state.show === 'attention' || state.show === 'words') ? 'none' : '';
      if (one.box.style.display === 'none') return;
      paint(one, map, bounds, box);
      one.canvas.setAttribute('aria-label', `${data.views[state.show]} of ${one.panel.name}, layer ${state.l}; arrow keys move the framed patch`);
      one.chips.hidden = state.show !== 'attention' || !one.heads.length;
      one.heads.forEach((button, n) => button.setAttribute('aria-pressed',
        String(one.panel.ranked[n].layer === state.l && one.panel.ranked[n].head === state.h)));
      one.tokens.forEach((button, t) => button.setAttribute('aria-pressed', String(t === state.t && state.show === 'attention')));
      readings(one, map, box, patch, row);
    });
  }

  const brush = scale.getContext('2d');
  for (let i = 0; i < scale.width; i += 1) {
    brush.fillStyle = `rgb(${color(i / (scale.width - 1)).map(Math.round).join(',')})`;
    brush.fillRect(i, 0, 1, scale.height);
  }
  image.onload = draw;
  image.src = data.image;
  const watch = new ResizeObserver(() => draw());
  watch.observe(panels);
  draw();
  return () => { watch.disconnect(); clearTimeout(timer); };
}
