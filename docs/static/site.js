// SPDX-License-Identifier: Apache-2.0
// Code and tables that are wider than the screen can be scrolled with the keyboard as well.
"use strict";
addEventListener("DOMContentLoaded", () => {
  for (const block of document.querySelectorAll("pre, .table-wrapper")) {
    if (block.scrollWidth > block.clientWidth) block.tabIndex = 0;
  }
});
