// Asks for the label as the text changes and, after a longer pause, for what each word weighs. What the server sends reaches the
// page as text only (textContent), never as HTML; the labels, their number and their order are the server's.
"use strict";

const LABEL_AFTER = 250;     // ms without typing
const WORDS_AFTER = 700;
const LEAST_SCALE = 0.05;    // colours scale to the largest weight, but to no less than this: tiny weights stay pale
const LONGEST_WAIT = 60;     // s: a server that asks for more is not waited for
const OPPOSITE = { low: "high", high: "low", mid: "other" };
const MESSAGES = {
  400: "Não há o que analisar: o texto está em branco.",
  401: "Este servidor pede uma chave de API.",
  413: "O texto é grande demais para o servidor. Tente um trecho menor.",
  422: "O servidor não aceitou este texto.",
  503: "O serviço não está disponível agora. Tente de novo daqui a pouco.",
  504: "O servidor demorou demais para responder. Tente de novo ou use um texto menor.",
};

const $ = (id) => document.getElementById(id);
const list = (between, ...parts) => parts.filter(Boolean).join(between);
const element = (tag, className, textContent) => Object.assign(document.createElement(tag), { className, textContent });
const failure = (message, status) => Object.assign(new Error(message), { status, forReader: true });
const decimal = (value, digits, more) =>
  value.toLocaleString("pt-BR", { minimumFractionDigits: digits, maximumFractionDigits: digits, ...more }).replace("-", "−");

// A probability that would round to nothing or to all is said to be short of it.
const percent = (value) => value > 0 && value < 0.0005 ? "< 0,1%"
  : value < 1 && value >= 0.9995 ? "> 99,9%" : `${decimal(value * 100, 1)}%`;
const pause = (ms, signal) => new Promise((resolve, reject) => {
  setTimeout(resolve, ms);    // without effect once rejected
  signal.addEventListener("abort", () => reject(signal.reason));
});

let apiKey = "";
try { apiKey = sessionStorage.getItem("api-key") ?? ""; } catch { /* switched off: the key lives as long as the page */ }
function keepKey(key) {
  apiKey = key;
  try { sessionStorage.setItem("api-key", key); } catch { /* as above */ }
}

/** The server's answer about the text. A busy server is asked once more, after the time that it names. */
async function ask(path, text, signal, tell, mayRetry = true) {
  const headers = { "Content-Type": "application/json", ...(apiKey && { "X-API-Key": apiKey }) };
  let response, body;
  try {
    response = await fetch(path, { method: "POST", headers, body: JSON.stringify({ text }), signal });
    body = await response.text();
  } catch {
    signal.throwIfAborted();
    throw failure("Não foi possível falar com o servidor. Verifique a conexão e tente de novo.");
  }
  const { status } = response;
  const seconds = status === 503 ? Number.parseInt(response.headers.get("Retry-After"), 10) : NaN;
  if (mayRetry && seconds <= LONGEST_WAIT) {
    tell(`O servidor está ocupado. Nova tentativa em ${seconds} s…`);
    await pause(seconds * 1000, signal);
    tell("Tentando de novo…");
    return ask(path, text, signal, tell, false);
  }
  if (seconds >= 0) throw failure("O servidor está ocupado demais agora. Tente de novo daqui a pouco.", status);
  if (response.ok) return JSON.parse(body);
  const refused = status === 401 && apiKey && "O servidor não aceitou a chave de API.";
  if (refused) keepKey("");
  throw failure(refused || MESSAGES[status] || `O servidor respondeu com um erro (${status}).`, status);
}

/** The colour of a label: the first has one end's, the last the other's, those between a neutral one. */
function tone(probabilities, label) {
  const labels = Object.keys(probabilities);
  const at = labels.indexOf(label);
  return at === 0 ? "low" : at === labels.length - 1 ? "high" : "mid";
}

function say(message, error = false) {
  $("message").textContent = message;
  $("message").classList.toggle("error", error);
}

function sayOfWords(message) {
  $("explain-message").textContent = message;
  $("explained").hidden = Boolean(message);
  $("explanation").hidden = false;
}

function clear(message, error) {
  for (const id of ["verdict", "bars", "notes"]) $(id).replaceChildren();
  for (const id of ["again", "key-form", "explanation"]) $(id).hidden = true;
  document.body.classList.remove("waiting", "unexplained");
  say(message, error);
}

function showAnswer({ sentiment, score, probabilities, truncated, model_version: version }) {
  const classes = Object.entries(probabilities);
  const bars = $("bars");    // its rows stay, so that the bars glide to their new lengths
  while (bars.children.length > classes.length) bars.lastElementChild.remove();
  while (bars.children.length < classes.length) bars.append($("bar").content.cloneNode(true));
  classes.forEach(([label, value], at) => {
    const [name, track, share] = bars.children[at].children;
    bars.children[at].className = `${tone(probabilities, label)} ${label === sentiment ? "answered" : ""}`;
    name.textContent = label;
    track.firstElementChild.style.width = `${value * 100}%`;
    share.textContent = percent(value);
  });
  $("verdict").replaceChildren(element("strong", tone(probabilities, sentiment), sentiment), " ",
    element("span", "", `${percent(score)} de probabilidade`));
  $("notes").textContent = list(" ", truncated && "O texto é mais longo do que o modelo consegue ler: o final ficou de fora.",
    Math.max(...Object.values(probabilities)) > probabilities[sentiment]
      && "Outra classe é mais provável, mas o modelo decide por um limiar próprio.");
  for (const id of ["again", "key-form"]) $(id).hidden = true;
  document.body.classList.remove("waiting");
  say("");
  if (version !== shownVersion) showModel(version);
}

function showWords({ explained, probabilities, words, words_left_out: left, method }, text) {
  const letters = Array.from(text);    // offsets count code points, a string's own indices UTF-16 units
  const agrees = tone(probabilities, explained);
  const strongest = Math.max(0, ...words.map(({ weight }) => Math.abs(weight)));
  const buttons = words.map(({ start, end, weight }) => {
    const written = letters.slice(start, end).join("");
    const strength = Math.abs(weight) / Math.max(strongest, LEAST_SCALE);
    const sign = strength < 0.1 ? "" : weight > 0 ? "for" : "against";
    const button = element("button", `${weight < 0 ? OPPOSITE[agrees] : agrees} ${sign}`, written);
    const points = decimal(Math.abs(weight) * 100, 1);
    const change = points === "0,0" ? "quase não muda" : `${weight > 0 ? "cai" : "sobe"} ${points} pontos percentuais`;
    button.type = "button";
    button.title = `${decimal(weight * 100, 1, { signDisplay: "exceptZero" })} pontos percentuais`;
    button.ariaLabel = button.dataset.detail = `Sem “${written}”, a probabilidade de “${explained}” ${change}.`;
    button.style.setProperty("--strength", strength.toFixed(3));
    return button;
  });
  const gaps = [0, ...words.map(({ end }) => end)].map((end, at) => letters.slice(end, words[at]?.start).join(""));
  $("words").replaceChildren(...gaps.flatMap((gap, at) => [gap, ...buttons.slice(at, at + 1)]));
  [$("for").className, $("against").className] = [agrees, OPPOSITE[agrees]];
  $("left-out").textContent = left > 0 ? `Palavras do final que não foram examinadas: ${decimal(left, 0)}.` : "";
  if (method !== "occlusion") $("method").textContent = `${method}.`;
  if (buttons.length) choose(buttons[words.findIndex(({ weight }) => Math.abs(weight) === strongest)]);
  sayOfWords(buttons.length ? "" : "Não há palavras para examinar.");
  document.body.classList.remove("unexplained");
}

/** Says a word's weight below the text, for touch and keyboard, which have no tooltip. */
function choose(chosen) {
  for (const button of $("words").children) {
    button.tabIndex = button === chosen ? 0 : -1;    // one tab stop, the arrows do the rest
    button.classList.toggle("chosen", button === chosen);
  }
  $("detail").textContent = chosen.dataset.detail;
}

let current = new AbortController();
/** Label, then words. A newer text aborts what an older one still waits for, so that answers never show out of order. */
async function follow() {
  current.abort();
  current = new AbortController();
  const [{ signal }, text] = [current, $("text").value];
  if (!text.trim()) return clear("O resultado aparece aqui enquanto você escreve.");
  document.body.classList.add("waiting", "unexplained");
  const longerPause = performance.now() + WORDS_AFTER;
  try {
    await pause(LABEL_AFTER, signal);
    if (!$("verdict").textContent) say("Analisando…");
    showAnswer(await ask("predict", text, signal, say));
    await pause(longerPause - performance.now(), signal);
    if ($("explanation").hidden) sayOfWords("Examinando as palavras…");
    showWords(await ask("explain", text, signal, sayOfWords), text);
  } catch (error) {
    if (signal.aborted) return;
    const message = error.forReader ? error.message : "O servidor deu uma resposta que esta página não entende.";
    const labelled = !document.body.classList.contains("waiting") && error.status !== 401;
    if (labelled) return sayOfWords(`As palavras ficaram sem explicação. ${message}`);
    clear(message, true);
    $("key-form").hidden = error.status !== 401;
    $("again").hidden = [400, 401, 413, 422].includes(error.status);
  }
}

let shownVersion;
async function showModel(version) {
  shownVersion = version;
  try {
    const health = await (await fetch("health")).json();
    shownVersion = health.model_version;
    if (!health.model_loaded) return void ($("model").textContent = "Ainda não há modelo em produção.");
    $("model").textContent = list(" · ", `Modelo ${shownVersion}`, list(" ", health.engine, health.precision), health.device);
    const { f1_macro: f1, f1_macro_low: low, f1_macro_high: high, accuracy, reviews } = health.metrics ?? {};
    const interval = low && high && ` (intervalo de 95%: ${decimal(low, 3)} a ${decimal(high, 3)})`;
    $("metrics").textContent = list(" · ", f1 && `F1 macro ${decimal(f1, 3)}${interval || ""}`,
      accuracy && `acurácia ${decimal(accuracy, 3)}`, reviews && `${decimal(reviews, 0)} avaliações de teste`);
  } catch {
    $("model").textContent = "Não foi possível consultar o modelo.";
  }
}

$("text").addEventListener("input", follow);
$("again").addEventListener("click", follow);
addEventListener("pageshow", follow);    // a browser may bring a text back
$("examples").addEventListener("click", ({ target }) => {
  if (!target.dataset.text) return;
  $("text").value = target.dataset.text;
  follow();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey($("key").value);
  $("key").value = "";
  follow();
});
$("words").addEventListener("click", ({ target }) => target.dataset.detail && choose(target));
$("words").addEventListener("keydown", (event) => {
  const { nextElementSibling: ArrowRight, previousElementSibling: ArrowLeft } = event.target;
  const { firstElementChild: Home, lastElementChild: End } = $("words");
  const next = { ArrowRight, ArrowLeft, Home, End }[event.key];
  if (!next || event.altKey || event.ctrlKey || event.metaKey) return;    // those are the browser's: back, say
  event.preventDefault();
  choose(next);
  next.focus();
});
showModel();
