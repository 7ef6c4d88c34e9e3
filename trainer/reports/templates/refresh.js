// A page of a run that is at work loads itself anew, and stays where its reader is: the place, what is unfolded. It
// waits while nobody looks, and while something is selected.
const key = `report:${location.pathname}`;

function folds() {
  const seen = {};
  return [...document.querySelectorAll("details")].map((fold) => {
    const name = fold.querySelector("summary").textContent;
    seen[name] = (seen[name] ?? 0) + 1;
    return [`${name}#${seen[name]}`, fold];
  });
}

function restore() {
  const kept = JSON.parse(sessionStorage.getItem(key) ?? "null");
  if (kept === null) return;
  for (const [name, fold] of folds()) fold.open = kept.open.includes(name);
  scrollTo(0, kept.y);
}

function keep() {
  const open = folds().filter(([, fold]) => fold.open).map(([name]) => name);
  sessionStorage.setItem(key, JSON.stringify({ y: scrollY, open }));
}

function refresh() {
  if (document.hidden || getSelection().toString()) return;
  try { keep(); } catch { /* a browser that keeps nothing of a file */ }
  location.reload();
}

addEventListener("load", () => {
  try { restore(); } catch { /* likewise */ }
  setInterval(refresh, 1000 * Number(document.body.dataset.refreshS));
});
