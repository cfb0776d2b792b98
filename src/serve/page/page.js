// The page: pictures go to /v1/models/NAME/classify one by one, a few at a time; every change of a setting scores
// them again. Nothing is stored, and nothing is sent elsewhere.

const LANES = 4; // requests at a time
const SAMPLES = ['airplane', 'ship', 'truck']; // pictures that the server has
const $ = (id) => document.getElementById(id);
const settings = $('settings');
const cards = []; // as shown, newest batch first
const waiting = []; // cards to score
let model; // the chosen model's card
let key = '';
let running = 0;
let pasted = 0;

// ---- Words and numbers ----

function percent(share) {
  if (share > 0 && share < 0.0005) return '<0.1 %';
  if (share < 1 && share >= 0.9995) return '>99.9 %';
  return `${(100 * share).toFixed(1)} %`;
}

const plural = (count, noun) => `${count.toLocaleString('en')} ${noun}${count === 1 ? '' : 's'}`;
const millis = (time) => `${time < 10 ? time.toFixed(2) : time < 100 ? time.toFixed(1) : Math.round(time)} ms`;

function node(name, ...content) {
  const element = document.createElement(name);
  element.append(...content);
  return element;
}

/** Fills a definition list with [term, description] pairs. */
function describe(list, pairs) {
  list.replaceChildren(...pairs.map(([term, text]) => node('div', node('dt', term), node('dd', text))));
}

// ---- The server ----

/** An error with a sentence for the reader, and whether the same request may succeed later. */
class Failure extends Error {
  constructor(sentence, { status, again = true } = {}) {
    super(sentence);
    this.status = status;
    this.again = again;
  }
}

/** Statuses that say nothing of the request itself; a model that is not there may come. */
const mayPass = (status) => status >= 500 || [401, 404, 408, 429].includes(status);

/** The server's JSON, or a Failure that says in a sentence why there is none. */
async function call(path, init = {}) {
  const sent = key;
  let response;
  try {
    const headers = { ...init.headers, ...(sent && { authorization: `Bearer ${sent}` }) };
    response = await fetch(path, { ...init, headers });
    if (response.ok) {
      const reply = await response.json();
      if (!$('key-form').hidden) $('choose').focus();
      $('key-form').hidden = true;
      return reply;
    }
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    await init.body?.slice(0, 1).arrayBuffer().catch(() => {
      const sentence = 'This file cannot be read: it is a folder, or was moved or changed. Choose the picture again.';
      throw new Failure(sentence, { again: false });
    });
    const large = init.body ? `, or it closed the connection on a picture of ${plural(init.body.size, 'byte')}` : '';
    throw new Failure(`The server gave no answer: it has stopped or cannot be reached${large}. Try again in a moment.`);
  }
  const problem = await response.json().catch(() => init.signal?.throwIfAborted() ?? {});
  const sentence = problem.detail ?? `The server answered ${response.status} and gave no reason.`;
  if (response.status === 401) askForKey(sentence, sent);
  throw new Failure(sentence + whenAgain(response), { status: response.status, again: mayPass(response.status) });
}

function whenAgain(response) {
  const seconds = Number(response.headers.get('retry-after'));
  if (!seconds) return '';
  const time = new Date(Date.now() + 1000 * seconds).toLocaleTimeString('en', { hourCycle: 'h23' });
  return ` (Try again in ${plural(seconds, 'second')}, from ${time}.)`;
}

function askForKey(sentence, refused) {
  const shown = !$('key-form').hidden;
  $('key-form').hidden = false;
  $('key-hint').textContent = `${sentence} (The page keeps a key until you close or reload it.)`;
  $('key').ariaInvalid = String(Boolean(refused));
  if (!shown) $('key').focus();
}

// ---- Models ----

async function loadModels() {
  $('notice').hidden = true;
  try {
    const { models } = await call('v1/models');
    if (models.length === 0) throw new Failure('This server has no model loaded. Load one, then try again.');
    const chosen = models.find((m) => m.name === model?.name) ?? models.find((m) => m.default) ?? models[0];
    $('model').replaceChildren(...models.map((m) => new Option(m.name, m.name, false, m === chosen)));
    $('model').disabled = false;
    await loadCard(chosen.name);
  } catch (error) {
    notify(error);
  }
}

async function loadCard(name) {
  $('notice').hidden = true;
  const card = await call(`v1/models/${encodeURIComponent(name)}`);
  if ($('model').value !== name) return; // another was chosen meanwhile
  model = card;
  const calibrated = card.scale === 'calibrated';
  $('prior').disabled = $('alpha').disabled = !calibrated;
  $('prior').hidden = $('alpha').hidden = !calibrated;
  $('uncalibrated').hidden = calibrated;
  const familiarity = card.calibration?.familiarity;
  $('unlike').hidden = !familiarity;
  $('unlike-share').disabled = !familiarity;
  for (const option of $('unlike-share').options) option.disabled = Number(option.value) > 0 && option.value < familiarity?.least;
  $('top-k').max = card.manifest.classes.length;
  describe($('facts'), [
    ['Network', card.manifest.arch],
    ['Version', `${card.version}, on ${card.device}`],
    ['Classes', card.manifest.classes.length.toLocaleString('en')],
    ['Scores', calibrated ? 'calibrated probabilities' : 'softmax, not calibrated'],
    ...(card.calibration ? [['Calibration', `${card.calibration.id}: ${fitted(card.calibration)}`]] : []),
    ...(familiarity ? [['Familiarity', `by ${familiarity.questions.join(', ')}`]] : []),
  ]);
  offerSamples(card.manifest.classes.map((c) => c.label));
  scoreAll();
}

/** What a calibration fits, in words. */
function fitted({ rung, classes, trend }) {
  const own = classes.filter((c) => c.status === 'fitted').length;
  const scales = `scale and bias of each class (${own} of ${classes.length} from mostly their own images)`;
  return {
    'prior-shift': 'class frequencies only',
    temperature: 'one temperature',
    'temperature-bias': 'temperature, bias of each class',
    'structured-vector-scaling': `temperature, ${trend ? 'trend over frequency, ' : ''}${scales}`,
  }[rung] ?? rung;
}

/** Shows those of the server's own pictures whose class the model has. */
function offerSamples(labels) {
  const known = SAMPLES.filter((label) => labels.includes(label));
  $('samples').hidden = known.length === 0;
  $('samples').querySelectorAll('button').forEach((button) => button.remove());
  $('samples').append(...known.map((label) => {
    const path = `pictures/${label}.jpg`;
    const image = node('img');
    Object.assign(image, { src: path, alt: `Picture of class ${label}`, width: 64, height: 64 });
    const button = node('button', image);
    button.type = 'button';
    button.id = `sample-${label}`;
    button.addEventListener('click', async () => {
      const picture = await fetch(path).then((reply) => reply.blob()).catch(() => null);
      if (picture) add([new File([picture], `${label}.jpg`, { type: 'image/jpeg' })]);
      else $('status').textContent = 'The server gave no answer: it has stopped or cannot be reached.';
    });
    return button;
  }));
}

function notify(error) {
  if (!(error instanceof Failure)) throw error;
  if (error.status === 401) return; // the key's form says it
  $('notice').querySelector('p').textContent = error.message;
  $('notice').hidden = false;
}

// ---- Pictures ----

function add(files) {
  if (files.length === 0) return;
  const added = [...files].map((file) => newCard(file));
  cards.unshift(...added);
  $('cards').prepend(...added.map((card) => card.element));
  added.forEach(enqueue);
  added[0].element.scrollIntoView({ block: innerWidth < 900 ? 'start' : 'nearest' });
}

function newCard(file) {
  const element = $('card').content.cloneNode(true).firstElementChild;
  const card = { file, element, url: URL.createObjectURL(file), result: null };
  const name = file.name || 'picture';
  const image = element.querySelector('img');
  image.addEventListener('error', () => image.replaceWith('no preview'));
  image.src = card.url;
  element.querySelector('h3').textContent = name;
  element.ariaLabel = name;
  element.querySelector('.remove').ariaLabel = `Remove ${name}`;
  element.querySelector('.remove').addEventListener('click', () => {
    const next = cards[cards.indexOf(card) + 1] ?? cards[cards.indexOf(card) - 1];
    remove(card);
    (next?.element.querySelector('.remove') ?? $('choose')).focus();
  });
  element.querySelector('.retry').addEventListener('click', () => {
    element.focus();
    enqueue(card);
  });
  return card;
}

function remove(card) {
  card.request?.abort();
  URL.revokeObjectURL(card.url);
  card.element.remove();
  cards.splice(cards.indexOf(card), 1);
  if (waiting.includes(card)) waiting.splice(waiting.indexOf(card), 1);
  report();
}

function enqueue(card) {
  card.request?.abort();
  card.request = null;
  card.element.ariaBusy = 'true';
  if (!card.result) state(card, 'Waiting…', 'new');
  if (!waiting.includes(card)) waiting.push(card);
  pump();
}

const scoreAll = () => cards.forEach(enqueue);

function pump() {
  while (model && running < LANES && waiting.length > 0) {
    running += 1;
    score(waiting.shift()).finally(() => {
      running -= 1;
      pump();
    });
  }
  report();
}

async function score(card) {
  const request = new AbortController();
  card.request = request;
  if (!card.result) state(card, 'Scoring…', 'new');
  const chosen = new FormData(settings); // disabled fields stay out
  const extras = model.calibration?.familiarity ? ',familiarity' : '';
  const query = new URLSearchParams({ include: `uncalibrated,support,timings${extras}` });
  chosen.forEach((value, name) => { if (value && name !== 'model') query.set(name, value); });
  const began = performance.now();
  try {
    const reply = await call(`v1/models/${encodeURIComponent(model.name)}/classify?${query}`, {
      method: 'POST',
      body: card.file,
      headers: { 'content-type': 'application/octet-stream' }, // the server looks at the bytes
      signal: request.signal,
    });
    const limited = query.has('min_score') || Number(query.get('unlike')) > 0;
    show(card, reply, limited, performance.now() - began);
  } catch (error) {
    if (error.name === 'AbortError') return;
    card.result = null;
    state(card, 'Not scored', 'failed');
    card.element.querySelector('.problem p').textContent = error instanceof Failure ? error.message : String(error);
    card.element.querySelector('.retry').hidden = error.again === false;
  }
  card.element.ariaBusy = null;
}

/** Shows of a card what belongs to a state: new, scored or failed. */
function state(card, best, name) {
  card.element.querySelector('.best').textContent = best;
  card.element.querySelector('.decision').hidden = name !== 'scored';
  card.element.querySelector('.scores').hidden = name !== 'scored';
  card.element.querySelector('.problem').hidden = name !== 'failed';
}

/** Says in the live region how far the work is. */
function report() {
  const busy = cards.filter((card) => card.element.ariaBusy === 'true').length;
  const done = cards.filter((card) => card.result).length;
  const failed = cards.length - done;
  let text = '';
  if (busy > 0 && !model) text = `${plural(busy, 'picture')} waiting for a model.`;
  else if (busy > 0) text = `Scoring ${plural(busy, 'picture')}…`;
  else if (cards.length === 1 && done === 1) text = `Scored: ${cards[0].element.querySelector('.best').textContent}.`;
  else if (cards.length > 0) text = `${plural(done, 'picture')} scored${failed ? `, ${failed} not scored` : ''}.`;
  if ($('status').textContent !== text) $('status').textContent = text;
  document.body.classList.toggle('filled', cards.length > 0);
}

// ---- An answer ----

function show(card, reply, limited, roundTrip) {
  const [result] = reply.results;
  const calibrated = reply.scale === 'calibrated';
  const part = (selector) => card.element.querySelector(selector);
  const put = (selector, text) => { part(selector).textContent = text; };
  const [best] = result.predictions;
  const abstains = result.decision === 'abstain';
  state(card, best ? `${best.label}, ${percent(best.score)}` : 'No class', 'scored');
  put('.decision', abstains ? `abstain: ${inWords(result.reason)}` : result.decision);
  part('.decision').hidden = !limited && !abstains; // nothing was asked of the best class
  part('.decision').classList.toggle('abstain', abstains);
  part('.scores').classList.toggle('plain', !calibrated);
  put('.of-score', calibrated ? `calibrated, ${reply.prior} prior` : 'softmax: ranks classes, not a probability');
  part('.of-softmax').hidden = !calibrated;
  part('.legend').hidden = !best;
  const before = new Map(card.result?.predictions.map((p) => [p.class_id, p]));
  part('.rows').replaceChildren(...result.predictions.map((p) => row(p, before.get(p.class_id), calibrated)));
  part('.familiarity').hidden = !result.familiarity;
  if (result.familiarity) put('.familiarity', familiar(result.familiarity));
  part('.set').hidden = !result.set;
  if (result.set) {
    const { alpha, labels, holds_for: mix } = result.set;
    const [size, of, share] = [labels.length, model.manifest.classes.length, percent(alpha).replace('.0', '')];
    put('.set p', `Set of ${size} of ${of} classes: misses the true one for at most ${share} of images (${mix} mix)`);
    part('.set ul').replaceChildren(...labels.map((label) => node('li', label)));
  }
  const { batch, ...stages } = result.timings;
  const timings = Object.entries({ ...stages, 'round trip_ms': roundTrip })
    .map(([stage, time]) => [stage.replace('_ms', ''), millis(time)]);
  describe(part('.timings'), [...timings, ...(batch ? [['batch', plural(batch, 'image')]] : [])]);
  card.result = result;
}

/** A reason, without what the line on familiarity says. */
const inWords = (reason) => (reason.startsWith('unlike_training') ? 'unlike the training images' : reason);

const STANDS_OUT = {
  look: 'by its brightness, colours or details',
  distance: 'by what the network sees in it',
  confidence: 'because no class is convincing',
};

/** How like the training images an image is, in words. */
function familiar({ p, question }) {
  const share = p < 0.1 ? `${(100 * p).toPrecision(2)} %` : `${Math.round(100 * p)} %`;
  const rest = `of the images that are like them, ${share} stand out as much`;
  if (p > 0.05) return `Like the training images: ${rest}.`;
  return `${p > 0.01 ? 'Perhaps unlike' : 'Unlike'} the training images, ${STANDS_OUT[question]}: ${rest}.`;
}

function row(prediction, before, calibrated) {
  const element = $('row').content.cloneNode(true).firstElementChild;
  const put = (selector, text) => { element.querySelector(selector).textContent = text ?? ''; };
  const { label, group, training_images: trained, support, status } = prediction;
  put('.label', label);
  put('.group', group);
  put('.status', status?.replace('_', ' '));
  element.querySelector('.status').classList.toggle('weak', status !== 'fitted');
  const counts = [[trained, 'training'], [support, 'calibration']].filter(([count]) => count != null)
    .map(([count, use]) => `${count.toLocaleString('en')} ${use}`);
  put('.founded', counts.length > 0 ? `${counts.join(', ')} images` : '');
  const [score, softmax] = element.querySelectorAll('.bar');
  fill(score, `${label}, ${calibrated ? 'calibrated' : 'softmax'}`, prediction.score, before?.score);
  if (calibrated) fill(softmax, `${label}, softmax`, prediction.uncalibrated, before?.uncalibrated);
  else softmax.hidden = softmax.nextElementSibling.hidden = true;
  return element;
}

/** Draws one bar, moving from where the class stood before. */
function fill(bar, name, share, before = 0) {
  bar.ariaLabel = name;
  bar.ariaValueNow = share.toFixed(4);
  bar.ariaValueText = bar.nextElementSibling.textContent = percent(share);
  bar.firstElementChild.style.width = `${100 * before}%`;
  requestAnimationFrame(() => requestAnimationFrame(() => { bar.firstElementChild.style.width = `${100 * share}%`; }));
}

// ---- What the reader does ----

const HINTS = { uniform: 'Every class equally likely.', train: 'Classes as frequent as in training.' };

function hint() {
  const { prior, alpha, min_score: least } = settings.elements;
  const often = `Misses the true class at most ${100 * alpha.value} times in 100.`;
  $('prior-hint').textContent = HINTS[prior.value];
  $('alpha-hint').textContent = alpha.value ? often : 'No set is shown.';
  const { unlike } = settings.elements;
  $('unlike-hint').textContent = unlike.value > 0 ? `Of familiar images, ${100 * unlike.value} % are withheld, too.` : '';
  $('min-score-hint').textContent = least.value ? 'Classes that score less are left out.' : '';
}

settings.addEventListener('submit', (event) => event.preventDefault());
settings.addEventListener('change', (event) => {
  const { target } = event;
  if (target === $('top-k')) target.value = Math.min(Math.max(Math.round(target.value || 5), 1), target.max || 1e6);
  hint();
  if (target === $('model')) loadCard(target.value).catch(notify);
  else scoreAll();
});
$('key-form').addEventListener('submit', (event) => {
  event.preventDefault();
  key = $('key').value.trim();
  loadModels();
});
$('notice').querySelector('button').addEventListener('click', loadModels);
$('choose').addEventListener('click', () => $('files').click());
$('files').addEventListener('change', () => {
  add($('files').files);
  $('files').value = ''; // so that the same file can be chosen again
});
$('clear').addEventListener('click', () => {
  [...cards].forEach(remove);
  $('choose').focus();
});

document.addEventListener('paste', (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length === 0) return;
  event.preventDefault();
  add(files.map((file) => new File([file], `pasted ${(pasted += 1)}`, { type: file.type })));
});
const dragging = (on) => document.body.classList.toggle('dropping', on);
document.addEventListener('dragover', (event) => dragging(!event.preventDefault()));
document.addEventListener('dragleave', (event) => event.relatedTarget ?? dragging(false));
document.addEventListener('drop', (event) => {
  event.preventDefault();
  dragging(false);
  const { files } = event.dataTransfer;
  if (files.length === 0) $('status').textContent = 'That was not a file. Save the picture first, then drop the file.';
  add(files);
});

hint();
loadModels();
