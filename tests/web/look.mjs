// What a person with a browser sees of the status page: live, whole, on a phone, with the keyboard, by a screen reader.
//
//     node look.mjs MODULES SCREENSHOTS        DAYFLY_WEB_URL, DAYFLY_WEB_TOKEN, CHROMIUM (default: chromium)
//
// MODULES is where puppeteer-core and axe-core are installed. Every check that fails is a line, and the exit code is 1.

import { createRequire } from "node:module";
import { mkdirSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";

const [modules, screenshots] = process.argv.slice(2).map((path) => resolve(path));
const require = createRequire(join(modules, "look.mjs"));
const puppeteer = require("puppeteer-core");
const axeSource = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const url = process.env.DAYFLY_WEB_URL;
const token = process.env.DAYFLY_WEB_TOKEN;
const SEEN_MS = 30000;
let failed = 0;
let checks = 0;

function check(holds, what) {
  checks += 1;
  if (!holds) failed += 1;
  console.log(`${holds ? "ok  " : "FAIL"} ${what}`);
}

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  headless: true,
  args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
});

// A page whose every request and complaint is noted.
async function open(width, height, headers = {}) {
  const page = await browser.newPage();
  await page.setViewport({ width, height, deviceScaleFactor: 1 });
  await page.setExtraHTTPHeaders(headers);
  page.asked = [];
  page.complaints = [];
  page.on("request", (request) => page.asked.push(request.url()));
  page.on("console", (message) => { if (["error", "warn"].includes(message.type())) page.complaints.push(message.text()); });
  page.on("pageerror", (error) => page.complaints.push(String(error)));
  page.on("requestfailed", (request) => {
    // A request that is under way when the page is closed.
    if (request.failure()?.errorText !== "net::ERR_ABORTED") page.complaints.push(`${request.url()}: ${request.failure()?.errorText}`);
  });
  return page;
}

async function judge(page, name) {
  await page.evaluate(axeSource);
  const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  const serious = violations.filter((v) => ["serious", "critical"].includes(v.impact));
  for (const v of serious) console.log(`     ${v.id}: ${v.help}: ${v.nodes.map((n) => n.target.join(" ")).slice(0, 5).join("; ")}`);
  check(serious.length === 0, `${name}: axe-core finds no serious issue (${violations.length} of any kind)`);
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  check(wide <= 0, `${name}: no scrolling sideways (${wide} px beyond)`);
  const file = join(screenshots, `${name}.png`);
  await page.screenshot({ path: file, fullPage: true });
  console.log(`screenshot ${file}`);
}

function quiet(page, name) {
  const elsewhere = page.asked.filter((asked) => !asked.startsWith(`${url}/`));
  check(elsewhere.length === 0, `${name}: no request to another host ${elsewhere.slice(0, 3).join(" ")}`);
  check(page.complaints.length === 0, `${name}: no complaint on the console ${page.complaints.slice(0, 3).join(" | ")}`);
}

try {
  mkdirSync(screenshots, { recursive: true });

  // A job comes, is seen in its phase, and goes: without a reload.
  const page = await open(1280, 900);
  let loads = 0;
  page.on("load", () => { loads += 1; });
  await page.goto(url, { waitUntil: "load" });
  await page.waitForFunction(() => !document.querySelector("#jobs a"), { timeout: SEEN_MS });
  await page.waitForFunction(() => document.querySelector("#jobs")?.textContent.includes("its guest works at it"), { timeout: SEEN_MS });
  const seen = await page.evaluate(() => document.querySelector("#jobs a").textContent);
  const now = await (await fetch(`${url}/status.json`)).json();
  const job = now.jobs.find((job) => String(job.id) === seen);
  check(job?.state === "running", `the phase of job ${seen} is seen before it ends (it is ${job?.state ?? "over"})`);
  check(loads === 1, `without a reload (${loads} load)`);
  await judge(page, "overview");
  // Its row goes over to the ended ones, by itself.
  await page.waitForFunction((id) => [...document.querySelectorAll("#ended a")].some((a) => a.textContent === id), { timeout: SEEN_MS }, seen);
  check(loads === 1, `job ${seen} is among the ended ones, without a reload`);
  const rows = await page.evaluate(() => document.querySelectorAll("#ended tbody tr").length);
  check(rows >= 3, `${rows} ended jobs are listed`);

  // By the keyboard alone: the first stop skips to the content, and what has the focus keeps it while the page lives.
  await page.keyboard.press("Tab");
  check(await page.evaluate(() => document.activeElement.className === "skip"), "the first stop of the keyboard skips to the content");
  let stops = 0;
  while (stops < 60 && !(await page.evaluate(() => document.querySelector("#ended").contains(document.activeElement)))) {
    await page.keyboard.press("Tab");
    stops += 1;
  }
  const focused = await page.evaluate(() => document.activeElement.getAttribute("href"));
  check(focused?.startsWith("/jobs/"), `a job is reached by the keyboard in ${stops} stops`);
  await page.waitForFunction((before) => document.querySelector("#ended").textContent !== before, { timeout: SEEN_MS },
    await page.evaluate(() => document.querySelector("#ended").textContent));
  check((await page.evaluate(() => document.activeElement.getAttribute("href"))) === focused, "it keeps the focus while the page changes");
  await Promise.all([page.waitForNavigation({ waitUntil: "load" }), page.keyboard.press("Enter")]);
  check((await page.evaluate(() => document.querySelector("#steps").textContent)).includes("disk ready"), "Enter opens its page, with its steps");
  check((await page.evaluate(() => document.querySelector("#console").textContent)).includes("shown to who has the token"), "its console is not shown without the token");
  await judge(page, "job");
  quiet(page, "wide");
  const jobPage = page.url();
  await page.close();

  // On a phone.
  const phone = await open(360, 740);
  await phone.goto(url, { waitUntil: "load" });
  await judge(phone, "overview-phone");
  await phone.goto(jobPage, { waitUntil: "load" });
  await judge(phone, "job-phone");
  quiet(phone, "phone");
  await phone.close();

  // With the token, and in the dark.
  const holder = await open(1280, 900, { Authorization: `Bearer ${token}` });
  await holder.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "dark" }]);
  await holder.goto(jobPage, { waitUntil: "load" });
  check((await holder.evaluate(() => document.querySelector("#console pre")?.textContent ?? "")).includes("a machine of the kill harness"), "its console is shown with the token");
  await judge(holder, "job-console-dark");
  await holder.goto(url, { waitUntil: "load" });
  await judge(holder, "overview-dark");
  quiet(holder, "dark");
  await holder.close();

  // A daemon that is gone is said to be.
  const lost = await open(1280, 900);
  await lost.goto(url, { waitUntil: "load" });
  await lost.setOfflineMode(true);
  await lost.waitForFunction(() => document.querySelector("#lost").textContent !== "", { timeout: SEEN_MS });
  check(true, "a daemon that does not answer is said to be gone");
  await lost.setOfflineMode(false);
  await lost.waitForFunction(() => document.querySelector("#lost").textContent === "", { timeout: SEEN_MS });
  check(true, "and that it answers again");
  await lost.close();
} catch (error) {
  failed += 1;
  console.log(`FAIL ${error.stack ?? error}`);
} finally {
  await browser.close();
}
console.log(`figure web.checks ${checks}`);
console.log(`figure web.failed ${failed}`);
process.exit(failed === 0 ? 0 : 1);
