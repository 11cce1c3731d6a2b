// Presses the button whose key is typed. Without this script the page works by its buttons.
"use strict";

const opened = performance.now();
const UNSEEN = 250; // ms in which no pair was seen: a key typed then was meant for the last one
let sent = false;

document.documentElement.classList.add("scripted");

document.addEventListener("submit", (event) => {
  if (sent) event.preventDefault();
  sent = true;
});

// a page that the browser kept shows a pair that may be labeled by now
window.addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});

document.addEventListener("keydown", (event) => {
  if (event.target instanceof HTMLTextAreaElement) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (performance.now() - opened < UNSEEN) return;
  const button = document.querySelector(`[data-key="${CSS.escape(event.key.toLowerCase())}"]`);
  if (!button) return;
  event.preventDefault();
  button.click();
});

for (const button of document.querySelectorAll("[data-focus]")) {
  button.addEventListener("click", () => document.getElementById(button.dataset.focus).focus());
}
