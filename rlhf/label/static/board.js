// Cards that are dragged into ranks by mouse or touch (pointer events), or put there by the box on each card.

const NEAR = 60; // pixels from the window's edge at which dragging scrolls the page

export function makeBoard(board, said, changed) {
  const rows = [...board.querySelectorAll(".rank")];
  const cards = [...board.querySelectorAll(".card")].sort((a, b) => a.dataset.index - b.dataset.index);
  const box = (card) => card.querySelector("select");
  const rankOf = (card) => Number(card.closest(".rank").dataset.rank);

  function place(index, rank) {
    const card = cards[index];
    const list = rows.find((row) => Number(row.dataset.rank) === rank).querySelector("ul");
    const after = [...list.children].find((other) => Number(other.dataset.index) > index);
    list.insertBefore(card, after ?? null);
    box(card).value = String(rank);
  }

  function move(card, rank) {
    place(cards.indexOf(card), rank);
    const letter = card.querySelector("strong").textContent;
    said.textContent = rank ? `${letter} has rank ${rank}.` : `${letter} has no rank.`;
    changed();
  }

  for (const card of cards) {
    box(card).addEventListener("change", () => {
      move(card, Number(box(card).value));
      box(card).focus(); // which moving the card has taken away
    });
    card.addEventListener("pointerdown", (down) => {
      if (down.button !== 0 || !down.isPrimary || down.target.closest("select")) return;
      if (down.pointerType === "touch" && !down.target.closest(".grip")) return; // which scrolls the page
      down.preventDefault(); // or the text would be selected
      drag(card, down);
    });
  }

  function drag(card, down) {
    const from = { x: down.clientX + scrollX, y: down.clientY + scrollY };
    let at = down;
    let over = null;
    let frame = 0;
    card.setPointerCapture(down.pointerId);
    card.classList.add("dragged");

    function follow() {
      card.style.transform = `translate(${at.clientX + scrollX - from.x}px, ${at.clientY + scrollY - from.y}px)`;
      const under = document.elementsFromPoint(at.clientX, at.clientY).find((e) => e.matches("#board .rank"));
      if (under !== over) {
        over?.classList.remove("over");
        under?.classList.add("over");
        over = under ?? null;
      }
    }

    function scroll() {
      const beyond = Math.min(at.clientY - NEAR, 0) + Math.max(at.clientY - (innerHeight - NEAR), 0);
      if (beyond) {
        scrollBy(0, beyond / 4);
        follow();
      }
      frame = requestAnimationFrame(scroll);
    }

    function moved(event) {
      at = event;
      follow();
    }

    function end(event) {
      cancelAnimationFrame(frame);
      for (const name of ["pointerup", "pointercancel"]) card.removeEventListener(name, end);
      card.removeEventListener("pointermove", moved);
      card.classList.remove("dragged");
      card.style.transform = "";
      over?.classList.remove("over");
      if (event.type === "pointerup" && over && Number(over.dataset.rank) !== rankOf(card)) {
        move(card, Number(over.dataset.rank));
      }
    }

    card.addEventListener("pointermove", moved);
    for (const name of ["pointerup", "pointercancel"]) card.addEventListener(name, end);
    frame = requestAnimationFrame(scroll);
  }

  return { place, ranks: () => cards.map(rankOf), boxOf: (index) => box(cards[index]) };
}
