// Keeps the page as the daemon has it: asks for this very page again, and takes over what of it has changed. What has
// the focus keeps it, and only the one line of news is read out by a screen reader.
"use strict";

const PAUSE_MS = 1500;
const PAUSE_MS_MAX = 15000;
const DEADLINE_MS = 8000;

let pause = PAUSE_MS;

function takeOver(fresh) {
  for (const part of document.querySelectorAll("[data-live]")) {
    const other = fresh.getElementById(part.id);
    if (other === null || other.innerHTML === part.innerHTML) continue;
    const focused = part.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    const scrolled = [...part.querySelectorAll("pre")].map((pre) => pre.scrollTop + pre.clientHeight >= pre.scrollHeight - 4);
    part.replaceChildren(...document.adoptNode(other).childNodes);
    [...part.querySelectorAll("pre")].forEach((pre, i) => { if (scrolled[i] !== false) pre.scrollTop = pre.scrollHeight; });
    if (focused !== null) {
      const again = [...part.querySelectorAll("a")].find((link) => link.getAttribute("href") === focused);
      if (again !== undefined) again.focus();
    }
  }
  const title = fresh.querySelector("title");
  if (title !== null && title.textContent !== document.title) document.title = title.textContent;
}

function say(text) {
  const place = document.getElementById("lost");
  if (place.textContent !== text) place.textContent = text;
}

async function look() {
  if (document.hidden) return;
  try {
    const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(DEADLINE_MS) });
    if (!answer.ok) throw new Error(`it answers ${answer.status}`);
    takeOver(new DOMParser().parseFromString(await answer.text(), "text/html"));
    say("");
    pause = PAUSE_MS;
  } catch (error) {
    say(`The daemon does not answer; what is shown is of before. Trying again.`);
    pause = Math.min(2 * pause, PAUSE_MS_MAX);
  }
}

function next() {
  setTimeout(() => look().finally(next), pause);
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
for (const pre of document.querySelectorAll("pre")) pre.scrollTop = pre.scrollHeight;
next();
