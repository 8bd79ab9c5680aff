// The page of a server: it uses the API that programs use, and nothing else.

const form = document.getElementById("request");
const said = document.getElementById("said");
const stop = document.getElementById("stop");
const runs = document.getElementById("runs");
const past = document.getElementById("history");
const ended = ["completed", "failed", "deleted"];
const running = new Set();
let models = [];

function headers() {
  const key = form.elements.key.value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers() });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return answer;
}

async function read(path, options) {
  return (await ask(path, options)).json();
}

// Pictures and videos with a key cannot be loaded by an address alone.
async function load(element, path) {
  const url = URL.createObjectURL(await (await ask(path)).blob());
  if (element.src.startsWith("blob:")) URL.revokeObjectURL(element.src);
  element.src = url;
  element.hidden = false;
}

function option(text, value) {
  const made = document.createElement("option");
  made.textContent = text;
  made.value = value;
  return made;
}

async function showModels() {
  models = (await read("v1/models")).data;
  form.elements.model.replaceChildren(...models.map((model) => option(model.id, model.id)));
  showSizes();
}

function showSizes() {
  const model = models.find((one) => one.id === form.elements.model.value);
  const sizes = model.sizes.map((one) => option(`${one.size}, ${one.num_frames} frames (${one.seconds} s)`, `${one.size}x${one.num_frames}`));
  form.elements.size.replaceChildren(...sizes);
}

// The fields of a request; empty ones are the model's choice.
function requestOf(seed, scale) {
  const body = new FormData();
  for (const name of ["prompt", "negative_prompt", "model", "num_inference_steps", "guidance_scale", "stg_blocks"]) {
    const value = form.elements[name].value.trim();
    if (value) body.set(name, value);
  }
  const [width, height, frames] = form.elements.size.value.split("x");
  body.set("size", `${width}x${height}`);
  body.set("num_frames", frames);
  body.set("seed", seed);
  if (scale !== "") body.set("stg_scale", scale);
  const [picture] = form.elements.input_reference.files;
  if (picture) body.set("input_reference", picture);
  return body;
}

async function submit(event) {
  event.preventDefault();
  said.textContent = "";
  runs.replaceChildren();
  const seed = form.elements.seed.value || Math.floor(Math.random() * 2 ** 32);
  const scale = form.elements.stg_scale.value;
  const wanted = [[scale === "0" ? "Without STG" : "With STG", scale]];
  if (form.elements.compare.checked && scale !== "0") wanted.push(["Without STG", "0"]);
  try {
    for (const [title, own] of wanted) {
      const video = await read("v1/videos", { method: "POST", body: requestOf(seed, own) });
      follow(video, `${title}, seed ${video.seed}`);
    }
  } catch (error) {
    said.textContent = error.message;
  }
}

function cardOf(title) {
  const card = document.getElementById("run").content.firstElementChild.cloneNode(true);
  card.querySelector("h3").textContent = title;
  card.querySelector("progress").setAttribute("aria-label", `Progress, ${title}`);
  runs.append(card);
  return card;
}

async function follow(video, title) {
  const card = cardOf(title);
  const state = card.querySelector(".state");
  const steps = [];
  running.add(video.id);
  stop.disabled = false;
  state.textContent = "waiting";
  try {
    for await (const [kind, data] of eventsOf(video.id)) {
      if (kind === "step") showStep(card, data, steps);
      if (kind === "completed") await showVideo(card, data);
      if (kind === "failed") state.textContent = data.error.message;
      if (kind === "deleted") state.textContent = "deleted";
    }
  } catch (error) {
    state.textContent = error.message;
  } finally {
    running.delete(video.id);
    stop.disabled = running.size === 0;
    showHistory();
  }
}

// Server-sent events by fetch, which can send a key. A connection that breaks is taken up again.
async function* eventsOf(id) {
  let seen = 0;
  for (;;) {
    let index = 0;
    const reader = (await ask(`v1/videos/${id}/events`)).body.pipeThrough(new TextDecoderStream()).getReader();
    for await (const [kind, data] of parsed(reader)) {
      if (kind !== "step") yield [kind, data];
      else if (++index > seen) yield [kind, data], seen = index;
      if (ended.includes(kind)) return;
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

async function* parsed(reader) {
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = Object.fromEntries(block.split("\n").map((line) => [line.split(": ", 1)[0], line.slice(line.indexOf(": ") + 2)]));
      if (lines.data) yield [lines.event, JSON.parse(lines.data)];
    }
  }
}

function showStep(card, step, steps) {
  steps.push(step);
  card.querySelector("progress").value = step.progress;
  card.querySelector(".state").textContent = `step ${step.step} of ${step.steps}, ${step.seconds.toFixed(2)} s`;
  const image = card.querySelector("img");
  if (step.preview) {
    image.src = step.preview;
    image.hidden = false;
  }
  showPlot(card.querySelector("figure"), steps);
}

// A line for each other pass, and one for the seconds; each fills the height.
function showPlot(figure, steps) {
  const names = [...new Set(steps.flatMap((step) => Object.keys(step.distances)))];
  const lines = names.map((name, place) => [`|cond - ${name}|`, steps.map((step) => step.distances[name]), `line-${place % 4}`]);
  lines.push(["seconds", steps.map((step) => step.seconds), "seconds"]);
  const svg = figure.querySelector("svg");
  svg.replaceChildren(...lines.map(([, values, kind]) => {
    const most = Math.max(...values.filter((value) => value !== undefined), 1e-9);
    const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    const points = values.map((value, place) => value === undefined ? "" : `${(place + 0.5) * 300 / steps[0].steps},${88 - 84 * value / most}`);
    line.setAttribute("points", points.join(" "));
    line.setAttribute("class", kind);
    return line;
  }));
  figure.querySelector("figcaption").replaceChildren(...lines.map(([name, values, kind]) => {
    const label = document.createElement("span");
    label.className = kind;
    label.textContent = `${name} ${(values.at(-1) ?? 0).toPrecision(2)}`;
    return label;
  }));
  figure.hidden = false;
}

async function showVideo(card, video) {
  const screen = card.querySelector("video");
  await load(screen, `v1/videos/${video.id}/content`);
  card.querySelector("img").hidden = true;
  screen.play().catch(() => {});
  card.querySelector("progress").value = 100;
  const stages = Object.entries(video.stages).map(([name, seconds]) => `${name} ${seconds.toFixed(2)} s`);
  card.querySelector(".state").textContent = `made in ${video.inference_time_s.toFixed(2)} s: ${stages.join(", ")}`;
}

async function stopAll() {
  for (const id of [...running]) await read(`v1/videos/${id}/cancel`, { method: "POST" }).catch((error) => { said.textContent = error.message; });
}

async function showHistory() {
  const page = await read("v1/videos?limit=24");
  const items = page.data.filter((video) => video.status === "completed").map((video) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const image = document.createElement("img");
    image.alt = "";
    button.append(image, video.prompt);
    button.addEventListener("click", () => {
      runs.replaceChildren();
      showVideo(cardOf(`${video.prompt}, seed ${video.seed}`), video);
      runs.scrollIntoView();
    });
    item.append(button);
    load(image, `v1/videos/${video.id}/content?variant=thumbnail`).catch(() => {});
    return item;
  });
  past.replaceChildren(...items);
}

async function begin() {
  try {
    await showModels();
    await showHistory();
    said.textContent = "";
  } catch (error) {
    said.textContent = error.message;
  }
}

form.addEventListener("submit", submit);
form.elements.model.addEventListener("change", showSizes);
form.elements.key.addEventListener("change", begin);
stop.addEventListener("click", stopAll);
begin();
