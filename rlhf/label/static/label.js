// The page's behaviour: ranking by drag or by box, drafts, and saving. Everything is told by the elements of task.html.

import { makeBoard } from "./board.js";

const $ = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  if (answer.ok) return answer.json();
  const text = await answer.text();
  let said = text;
  try { said = JSON.parse(text).error; } catch { /* the answer of a proxy, say */ }
  throw new Error(said || answer.statusText);
}

function show(place, message) {
  place.textContent = message;
  place.hidden = !message;
}

// Signing in and out ---------------------------------------------------------------------------------------------

$("#sign-in")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await post("/sign-in", { name: $("#name").value });
    location.assign("/");
  } catch (error) {
    show($(".error", event.target), String(error.message));
  }
});

$("#sign-out")?.addEventListener("click", async () => {
  try {
    await post("/sign-out", {});
    location.assign("/");
  } catch (error) {
    show($(".who .error"), String(error.message));
  }
});

// A task ---------------------------------------------------------------------------------------------------------

const form = $("#task");
if (form) begin(form);

function begin(form) {
  const { kind, task, version, draft } = form.dataset;
  const count = Number(form.dataset.count);
  const indices = [...Array(count).keys()];
  const letters = all(".completion h2", form).map((title) => title.textContent.trim().split(" ").pop());
  const error = $("#error", form);
  const board = kind === "ranking" ? makeBoard($("#board", form), $("#said", form), changed) : null;
  let seconds = 0;
  let sending = false;

  // The time for which the page was in sight.
  let since = performance.now();
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) seconds += (performance.now() - since) / 1000;
    since = performance.now();
  });
  const elapsed = () => seconds + (document.hidden ? 0 : (performance.now() - since) / 1000);

  function ranks() {
    if (board) return board.ranks();
    const chosen = $("[name=preference]:checked", form);
    return chosen ? chosen.value.split(",").map(Number) : indices.map(() => 0);
  }

  function state() {
    if (kind === "demonstration") return { completion: $("#completion", form).value };
    return {
      ranks: ranks(),
      marks: indices.map((i) => Number($(`[name=mark-${i}]:checked`, form)?.value ?? 0)),
      flags: indices.map((i) => all(`[name=flag-${i}]:checked`, form).map((box) => box.value)),
    };
  }

  function fill(given) {
    if (kind === "demonstration") {
      $("#completion", form).value = given.completion ?? "";
      return;
    }
    (given.marks ?? []).forEach((mark, i) => {
      const radio = $(`[name=mark-${i}][value="${mark}"]`, form);
      if (radio) radio.checked = true;
    });
    (given.flags ?? []).forEach((names, i) => {
      all(`[name=flag-${i}]`, form).forEach((box) => { box.checked = names.includes(box.value); });
    });
    const places = given.ranks ?? [];
    if (board) places.forEach((rank, i) => board.place(i, rank));
    else if (places.length && places[0]) $(`[name=preference][value="${places.join(",")}"]`, form).checked = true;
    countFlags();
  }

  function countFlags() {
    for (const section of all(".completion", form)) {
      const flags = all(".flags :checked", section).length;
      $(".count", section).textContent = flags ? `(${flags})` : "";
    }
  }

  // What is not saved yet survives a reload of the page.
  function changed() {
    show(error, "");
    countFlags();
    keepDraft();
  }

  function keepDraft() {
    try {
      localStorage.setItem(draft, JSON.stringify({ ...state(), seconds: elapsed() }));
    } catch { /* no room, or not allowed: the page still has it */ }
  }

  function readDraft() {
    try { return JSON.parse(localStorage.getItem(draft)); } catch { return null; }
  }

  function dropDraft() {
    removeEventListener("pagehide", keepDraft);
    try { localStorage.removeItem(draft); } catch { /* there is none, then */ }
  }

  function missing() {
    if (kind === "demonstration") {
      const box = $("#completion", form);
      return box.value.trim() ? null : ["The answer is empty.", box];
    }
    const { ranks, marks } = state();
    const unmarked = indices.filter((i) => !marks[i]);
    if (unmarked.length) {
      return [`A mark is missing: ${unmarked.map((i) => letters[i]).join(", ")}.`, $(`[name=mark-${unmarked[0]}]`, form)];
    }
    const unranked = indices.filter((i) => !ranks[i]);
    if (!unranked.length) return null;
    if (!board) return ["Which one is better is missing.", $("[name=preference]", form)];
    return [`A rank is missing: ${unranked.map((i) => letters[i]).join(", ")}.`, board.boxOf(unranked[0])];
  }

  async function send(path, body) {
    if (sending) return;
    sending = true;
    form.setAttribute("aria-busy", "true");
    show(error, "");
    try {
      await post(path, { task: Number(task), version: Number(version), seconds: elapsed(), ...body });
      dropDraft();
      location.assign("/");
    } catch (problem) {
      show(error, `Not saved: ${problem.message}. Your answer is still on this page; try again.`);
      sending = false;
      form.removeAttribute("aria-busy");
    }
  }

  form.addEventListener("input", (event) => { if (!event.target.closest("#skip, #board")) changed(); });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const lacks = missing();
    if (lacks) {
      show(error, lacks[0]);
      lacks[1].focus();
    } else {
      send(kind === "demonstration" ? "/write" : "/rank", state());
    }
  });
  $("#skip-button", form).addEventListener("click", () => {
    const reason = $("#reason", form);
    if (reason.value) send("/skip", { reason: reason.value, note: $("#note", form).value });
    else {
      show(error, "Say why you skip it.");
      reason.focus();
    }
  });

  $("#discard", form).addEventListener("click", () => {
    dropDraft();
    location.reload();
  });

  const unsaved = readDraft();
  fill(unsaved ?? JSON.parse(form.dataset.state));
  if (unsaved) {
    seconds = unsaved.seconds;
    $("#unsaved", form).hidden = false;
    addEventListener("pagehide", keepDraft); // with the time until now
  }
}
